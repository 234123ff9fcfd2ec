"""Plain lines of progress: one at most every so often, and one end."""

from sendvae_fast import progress
from sendvae_fast.progress import Progress


def test_the_end_is_said_once(monkeypatch, capsys):
    """Also where the caller goes on asking after the last unit, as one who waits for processes does."""
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    with Progress("parts", total=2, unit="part") as parts:
        for count in (1, 1, 0, 0):
            parts.advance(count)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert "took" in lines[-1]
