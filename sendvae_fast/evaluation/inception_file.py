"""The weight file that FID is defined by."""

FILE = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of it; pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is the same file."""
WHERE_FROM = (
    f"{FILE} (or pytorch-fid's pt_inception-2015-12-05-6726825d.pth, the same file; sha256 {SHA256}) of "
    "github.com/toshas/torch-fidelity, release v0.2.0: fetch it, and give its path with --features.weights"
)
