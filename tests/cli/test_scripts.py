"""Exit codes, messages and arguments of the scripts in pipelines/."""

import pytest

from parcelray.cli.scripts import overrides_of, run_script, split_count
from parcelray.errors import SystemFailure, UserError


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("it is too large"), 2, "error: it is too large"),
        (SystemFailure("the store is away"), 1, "failed: the store is away"),
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
    ],
    ids=["user", "system", "ctrl-c"],
)
def test_an_error_ends_a_script_with_one_sentence_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    def broken(console: object) -> None:
        raise error

    assert run_script(broken) == code
    assert words in capsys.readouterr().out


def test_a_script_without_error_exits_with_0() -> None:
    assert run_script(lambda console: None) == 0


def test_arguments_are_overrides_and_an_optional_count() -> None:
    assert overrides_of(["--set", "a=1", "--set", "count=3"]) == ["a=1", "count=3"]
    for arguments in (["--set"], ["--steps", "3"]):
        with pytest.raises(UserError, match=r"this pipeline takes only --set a\.b=c"):
            overrides_of(arguments)
    assert split_count(["a=1", "count=3"], 9) == (3, ["a=1"])
    assert split_count(["a=1"], 9) == (9, ["a=1"])
    for count in ("0", "-1", "many"):
        with pytest.raises(UserError, match="it must be an integer of at least 1"):
            split_count([f"count={count}"], 9)
