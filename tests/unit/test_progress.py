"""Progress as a person sees it, on a terminal and in a log."""

import io

from vitalis_serve.progress import LINE_SECONDS, ProgressLines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_bar_that_is_drawn_over() -> None:
    """Every share redraws the same line; the next plain line begins a new one."""
    screen, said = Terminal(), []
    lines = ProgressLines(said.append, screen)
    for percent in (0, 50, 100):
        lines(f"gpt-oss-20b: 1.0 of 2.0 GB ({percent} %), 90 MB/s")
    lines("gpt-oss-20b: fetched, 20 s")
    drawn = screen.getvalue().split("\r\x1b[K")
    assert [part.count("█") for part in drawn] == [0, 0, 15, 30]
    assert screen.getvalue().endswith("\n")
    assert said == ["gpt-oss-20b: fetched, 20 s"]


def test_a_log_gets_a_share_now_and_then_and_every_other_line() -> None:
    """A download of an hour must not fill a log."""
    clock, said = [0.0], []
    lines = ProgressLines(said.append, io.StringIO(), lambda: clock[0])
    for second in range(25):
        clock[0] = float(second)
        lines(f"x: ({second} %)")
    lines("x: fetched")
    assert said == ["x: (0 %)", "x: (10 %)", "x: (20 %)", "x: fetched"]
    assert LINE_SECONDS == 10
