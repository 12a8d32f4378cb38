"""What the command line says of an option that a command has not."""

from __future__ import annotations

import pytest

from burnish.cli import _command_parser, build_parser, parse
from burnish.names import OPTIONS


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("plan r.yaml --gpus 8", "did you mean --devices?"),
        ("plan --num-gpus=8 r.yaml parallel.tp=2", "did you mean --devices?"),
        ("plan r.yaml --nproc 8", "did you mean --devices?"),
        ("plan r.yaml --nproc_per_node 8", "did you mean --devices-per-node?"),
        ("plan r.yaml --seq-len 8", "did you mean --tokens-per-row?"),
        ("plan r.yaml --devises 8", "did you mean --devices?"),
        ("export run --output x", "did you mean --out?"),
        ("chat m --max_tokens 8", "did you mean --max-new-tokens?"),
        ("sft r.yaml --dryrun", "did you mean --dry-run?"),
        ("sft r.yaml --lr 1", "keys of the recipe are given as a.b=c: set optim.lr"),
        ("sft r.yaml --learning_rate=1", "keys of the recipe are given as a.b=c: set optim.lr"),
        ("sft r.yaml --optim.lr=1", "keys of the recipe are given as a.b=c: set optim.lr"),
        ("sft r.yaml --tensor-model-parallel-size 2", "keys of the recipe are given as a.b=c: set parallel.tp"),
        ("sft r.yaml --seed 2", "keys of the recipe are given as a.b=c: set run.seed"),
    ],
)  # fmt: skip
def test_an_option_of_another_program_is_answered_with_ours(
    line: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line.split())
    said = capsys.readouterr().err.splitlines()[0]
    assert (caught.value.code, said.partition("unknown argument ")[2].partition("; ")[2]) == (2, remedy)


def test_an_option_that_nothing_is_like_is_only_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["sft", "r.yaml", "--zzz"])
    assert capsys.readouterr().err.splitlines()[0] == "burnish sft: unknown argument '--zzz'"


def test_every_option_of_another_program_leads_to_one_that_is_there() -> None:
    parser = build_parser()
    for (command, name), option in OPTIONS.items():
        actions = _command_parser(parser, command)._actions
        there = {known for action in actions for known in action.option_strings}
        assert option in there
        assert f"--{name.replace('_', '-')}" not in there
