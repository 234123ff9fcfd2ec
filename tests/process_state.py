"""Whether a process runs, as the kernel says."""

from pathlib import Path


def state_of(pid: int) -> str | None:
    """The letter that ps gives a process: "T" if it is stopped, "Z" if nobody looked at its end; None for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    return state_of(pid) not in (None, "Z")
