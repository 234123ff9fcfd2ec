"""A stand-in for CUDA on a CPU that checks the order of work, not speed or kernels.

Tensors on the fake device hold CPU tensors, so that everything computes as it is called and gives the right values;
what a GPU would do later, and in which order, is kept in clocks. Every host thread and every stream has a clock of what
has happened before its next work (`clocks`); every piece of memory knows who wrote and read it last (`memory`). What
is read before its writing has happened, or overwritten or given back while it may still be read, is noted as a problem,
also where the values came out right by luck.

    with FakeCuda() as cuda:          # the names of torch.cuda that the package uses are replaced
        ...                           # code with torch.device("cuda", 0)
    assert not cuda.problems

Not modelled: kernels (tests/cuda_on_cpu runs those), several GPUs, NCCL, and the backward pass, for which PyTorch's
autograd asks a real device; it runs on the streams of the forward pass.
"""

from fake_cuda.runtime import FakeCuda

__all__ = ["FakeCuda"]
