"""The stand-in itself: right values, and each kind of wrong order is noticed, no right one is."""

import pytest
import torch

from fake_cuda import FakeCuda

N = 4


@pytest.fixture
def cuda():
    with FakeCuda() as cuda:
        yield cuda


def device(*values):
    return torch.tensor(values or (1.0, 2.0)).to("cuda")


def pinned():
    return torch.zeros(2, pin_memory=True)


def test_values_and_devices(cuda):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.SiLU())
    x = torch.randn(5, 3)
    expected = layer(x)
    out = layer.to("cuda")(x.to("cuda"))
    assert out.is_cuda and torch.equal(out.cpu(), expected)
    view = torch.zeros(3, 2, device="cuda")
    view[1].add_(1)
    assert view.sum().item() == 2.0 and not cuda.problems


def read_early(side):
    with torch.cuda.stream(side):
        made = device() + 1
    return made * 2


def read_in_time(side):
    with torch.cuda.stream(side):
        made = device() + 1
    torch.cuda.current_stream().wait_stream(side)
    made.record_stream(torch.cuda.current_stream())
    return made * 2


def read_after_another_event(side):
    event = side.record_event()
    with torch.cuda.stream(side):
        made = device() + 1
    torch.cuda.current_stream().wait_event(event)
    made.record_stream(torch.cuda.current_stream())
    return made * 2


def overwritten_early(side):
    x = device()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    x.add_(1)
    side.synchronize()
    return y


def given_back_early(side):
    x = device()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    del x
    side.synchronize()
    return y


def host_reads_early(side):
    return device().to("cpu", non_blocking=True).tolist()


def host_reads_an_event_later(side):
    arriving = device().to("cpu", non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    return arriving.tolist()


def host_overwrites_early(side):
    buffer = pinned()
    on_device = buffer.to("cuda", non_blocking=True)
    buffer.copy_(torch.ones(2))
    return on_device


def host_overwrites_after_a_copy_that_waits(side):
    buffer = pinned()
    on_device = buffer.to("cuda")
    buffer.copy_(torch.ones(2))
    return on_device


@pytest.mark.parametrize(
    ("use", "problem"),
    [
        (read_early, "read before it is written"),
        (read_after_another_event, "read before it is written"),
        (overwritten_early, "overwritten while it is read"),
        (given_back_early, "given back while it is used"),
        (host_reads_early, "read before it is written: by thread"),
        (host_overwrites_early, "overwritten while it is read: by thread"),
        (read_in_time, None),
        (host_reads_an_event_later, None),
        (host_overwrites_after_a_copy_that_waits, None),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_orders(cuda, use, problem):
    use(torch.cuda.Stream())
    assert bool(cuda.problems) == bool(problem)
    assert problem is None or cuda.problems[0].startswith(problem)


def test_threads_are_ordered_by_their_results(cuda):
    def work():
        with torch.cuda.stream(side):
            made = device() + 1
        side.synchronize()
        return made

    side = torch.cuda.Stream()
    with cuda.executor(1) as pool:
        made = pool.submit(work).result()
        made.record_stream(torch.cuda.current_stream())
        assert (made * 2).sum().item() == 10 and not cuda.problems
        seen = []
        pool.submit(lambda: seen.append(work()))
        while not seen:
            pass
        assert seen[0].sum().item() == 5 and cuda.problems  # nobody told this thread that the other one has waited


def test_a_recording_runs_when_it_is_replayed(cuda):
    x, out = device(1.0, 2.0), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_((x + 1) * 2)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            out.sum().item()
    assert out.tolist() == [0, 0]
    graph.replay()
    assert out.cpu().tolist() == [4, 6]
    x.copy_(device(5.0, 6.0))
    graph.replay()
    assert out.cpu().tolist() == [12, 14] and not cuda.problems


def test_what_a_recording_reads_must_be_kept(cuda):
    x, out = device(), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(x)
    del x
    graph.replay()
    assert "given back after the capture" in cuda.problems[0]


def test_recordings_of_a_pool_share_their_memory(cuda):
    x, pool = device(), torch.cuda.graph_pool_handle()
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph, pool=pool):
            outs.append(x * 2)
    graphs[0].replay()
    outs[0].cpu()
    assert not cuda.problems
    graphs[1].replay()
    outs[0].cpu()
    assert "another recording of its pool" in cuda.problems[0]
