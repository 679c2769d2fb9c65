"""How a script in pipelines/ ends."""

import pytest

from parcelray.cluster.scripts import run_script


def test_ctrl_c_ends_a_script_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(console: object) -> None:
        raise KeyboardInterrupt

    assert run_script(interrupted) == 130
    assert "the same command goes on" in capsys.readouterr().out
