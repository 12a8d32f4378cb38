"""The command line. It reads arguments and shows errors; torch is imported only by the command that needs it."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence

from burnish import __version__
from burnish.signals import Interrupted, end_on_signals
from burnish.types import UserError

EXAMPLES = """\
  burnish sft examples/quickstart.yaml            fine-tune by a recipe; again to go on or to see the results
  burnish sft recipe.yaml optim.lr=2e-5 --dry-run check everything with one key changed, train nothing
  burnish inspect recipe.yaml                     see what is trained of the rows, token by token
  burnish plan recipe.yaml --hardware H100        memory and time of every rank, before there is a device
  burnish chat runs/quickstart/hf/step-300        talk to what came out
"""


class Parser(argparse.ArgumentParser):
    """argparse with the nearest name in its complaint about an unknown command or option."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - it exits, as NoReturn says
        if "argument COMMAND: invalid choice" in message:
            wrong = message.split("'")[1]
            near = difflib.get_close_matches(wrong, COMMANDS, 1, 0.5)
            message = f"no command {wrong!r}; " + (
                f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
            )
        self.exit(2, f"{self.prog}: {message}\nTry `{self.prog} --help`.\n")


def build_parser(with_keys: bool = False) -> argparse.ArgumentParser:
    """The parser of every command; `with_keys` writes all recipe keys into the help of `sft`."""
    parser = Parser(
        prog="burnish",
        description="Post-train language models.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"burnish {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    epilog = ""
    if with_keys:
        from burnish.recipe import help_text

        epilog = f"recipe keys, with their types and defaults:\n\n{help_text()}"
    sft = commands.add_parser(
        "sft",
        help="fine-tune a model by a recipe",
        epilog=epilog,
        description="Fine-tune a model by a recipe; started again, it goes on where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sft.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
    sft.add_argument("overrides", nargs="*", default=(), metavar="a.b=c", help="keys to change, such as optim.lr=2e-5")
    sft.add_argument("--dry-run", action="store_true", help="do everything but train: read, check, load, probe")

    commands.add_parser("schema", help="print the JSON schema of a recipe, for editors")

    evaluate = commands.add_parser(
        "evaluate",
        help="held-out loss of a model folder on rows",
        description="Loss, perplexity and accuracy of a Hugging Face folder on the trained tokens of rows.",
    )
    evaluate.add_argument("model", metavar="MODEL", help="a Hugging Face folder or hub id")
    evaluate.add_argument("data", metavar="DATA", help="rows, as data.train's path takes them")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        default=(),
        metavar="key=value",
        help="source keys (prompt_key=question) and recipe keys (data.max_length=2048)",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    inspect = commands.add_parser(
        "inspect",
        help="show what is trained of rows, token by token",
        description="Show rows as they would be trained, by a recipe or by a tokenizer alone. "
        "Exit status: 0 every row rendered, 3 some rows are errors, 2 unusable arguments.",
    )
    inspect.add_argument("target", metavar="RECIPE.yaml|DATA", help="a recipe, or rows as data.train's path takes them")
    inspect.add_argument(
        "overrides",
        nargs="*",
        default=(),
        metavar="key=value",
        help="recipe keys (data.max_length=2048); with DATA also its source's keys (prompt_key=question)",
    )
    inspect.add_argument("--tokenizer", metavar="DIR", help="tokenizer or model folder, or hub id; needed with DATA")
    inspect.add_argument("--chat-template", metavar="FILE", help="a Jinja template in place of the tokenizer's")
    inspect.add_argument("--chat-template-kwargs", metavar="JSON", help="its arguments: '{\"enable_thinking\": false}'")
    inspect.add_argument(
        "--limit", type=_positive, metavar="N", help="rows to show (terminal 5, html 200 in detail, json all)"
    )
    inspect.add_argument("--format", choices=("terminal", "html", "json"), default="terminal", help="(terminal)")
    inspect.add_argument("--out", metavar="FILE", help="where to write; standard output by default")
    inspect.add_argument("--tokens", action="store_true", help="show token boundaries (terminal)")

    plan = commands.add_parser(
        "plan",
        help="memory, time and layouts of a recipe, without a device",
        description="What a recipe needs on every rank and how long it takes, without weights or devices. "
        "Exit status: 0 planned, 3 it does not fit in the memory stated, 2 unusable arguments or recipe.",
    )
    plan.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
    plan.add_argument("overrides", nargs="*", default=(), metavar="a.b=c", help="keys to change, such as parallel.tp=4")
    plan.add_argument("--hardware", metavar="NAME", help="A100, H100, H200 or B200: adds time, and whether it fits")
    plan.add_argument("--peak", type=float, metavar="TFLOPS", help="dense bf16 peak of any other device")
    plan.add_argument("--bandwidth", type=float, metavar="GB/s", help="of its memory")
    plan.add_argument("--memory", type=float, metavar="GiB", help="memory of a device")
    plan.add_argument("--link", type=float, metavar="GB/s", help="one way between devices of a node")
    plan.add_argument("--network", type=float, metavar="GB/s", help="one way from a device to other nodes")
    plan.add_argument(
        "--efficiency", type=float, default=0.5, metavar="SHARE", help="share of the peak reached while computing (0.5)"
    )
    plan.add_argument("--devices", type=_positive, metavar="N", help="ranks; those of the recipe by default")
    plan.add_argument("--devices-per-node", type=_positive, default=8, metavar="N", help="in one node (8)")
    plan.add_argument("--tokens-per-row", type=_positive, metavar="N", help="plan without rows, all of this length")
    plan.add_argument("--rows", type=_positive, metavar="N", help="how many rows there would be")
    plan.add_argument("--fit", action="store_true", help="search the layouts that fit, fastest first")
    plan.add_argument("--json", metavar="FILE", help="write it as JSON too; - prints JSON alone")

    export = commands.add_parser("export", help="write a checkpoint of a run as a Hugging Face folder")
    export.add_argument("run", metavar="RUN", help="the run folder")
    export.add_argument("--step", type=int, help="the checkpoint's step; the newest by default")
    export.add_argument("--out", metavar="DIR", help="where to write; RUN/hf/step-N by default")

    for name, text in (("generate", "answer one prompt"), ("chat", "talk to a model")):
        command = commands.add_parser(
            name, help=text, description=f"{text.capitalize()} with an export or any Hugging Face folder."
        )
        command.add_argument("model", metavar="MODEL", help="a Hugging Face folder or hub id")
        if name == "generate":
            command.add_argument("prompt", metavar="PROMPT")
        command.add_argument("--system", help="the system turn")
        command.add_argument("--max-new-tokens", type=int, default=512, help="longest answer, tokens (512)")
        command.add_argument("--temperature", type=float, default=0.0, help="0 answers greedily (0)")
    return parser


COMMANDS = ("sft", "schema", "inspect", "plan", "evaluate", "export", "generate", "chat")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 1 or more")
    return int(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, with overrides wherever they stand between options."""
    parser = build_parser(with_keys=bool({"-h", "--help"} & set(arguments)) and "sft" in arguments)
    parsed, rest = parser.parse_known_args(arguments)
    takes_words = parsed.command == "inspect"  # which says of further files how to name them
    overrides = [a for a in rest if not a.startswith("-") and ("=" in a or takes_words)]
    options = [a for a in rest if a.startswith("-")]
    unknown = options or [a for a in rest if a not in overrides]
    if unknown or (overrides and not hasattr(parsed, "overrides")):
        wrong = (unknown or overrides)[0]
        command = _command_parser(parser, parsed.command)
        remedy = _remedy(command, parsed, wrong.partition("=")[0]) if wrong.startswith("-") else None
        command.error(f"unknown argument {wrong!r}" + (f"; {remedy}" if remedy else ""))
    if overrides:
        parsed.overrides = [*parsed.overrides, *overrides]
    return parsed


def _remedy(command: argparse.ArgumentParser, parsed: argparse.Namespace, wrong: str) -> str | None:
    """What to write in place of an option that the command has not: another, or a key of the recipe."""
    from burnish.names import OPTIONS, plain
    from burnish.recipe import remedy_for_option

    known = [option for action in command._actions for option in action.option_strings]
    option = OPTIONS.get((parsed.command, plain(wrong)))
    close, near = (difflib.get_close_matches(wrong.lower(), known, 1, cutoff) for cutoff in (0.8, 0.6))
    if option or close:
        return f"did you mean {option or close[0]}?"
    key = remedy_for_option(wrong) if hasattr(parsed, "overrides") else None
    return key or (f"did you mean {near[0]}?" if near else None)


def _command_parser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[command]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 failed, 2 unusable arguments or recipe, 3 inspected rows with
    errors, 130/143 interrupted, 141 when whoever read the output went away."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(parsed)
    except UserError as error:
        from burnish.cluster.launch import end_without_ray
        from burnish.cluster.ranks import LostHead
        from burnish.config import RecipeError

        print(f"burnish: error: {error}", file=sys.stderr)
        if isinstance(error, LostHead):
            end_without_ray(1)
        return 2 if isinstance(error, RecipeError) or parsed.command == "inspect" else 1
    except Interrupted as signal:
        print(f"burnish: {signal}", file=sys.stderr)
        # Where KeyboardInterrupt passed code made of text, such as a dataclass's, `python -m` would end by SIGINT, in
        # place of this status, unless such code has run to its end since.
        exec("")
        return signal.status
    except KeyboardInterrupt:
        print("burnish: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output (head, less) has seen enough; keep the interpreter from complaining at exit.
        sys.stdout = None
        return 141


def _run(parsed: argparse.Namespace) -> int:
    if parsed.command == "schema":
        from burnish.recipe import json_schema

        print(json.dumps(json_schema(), indent=2))
        return 0
    if parsed.command == "sft":
        with end_on_signals():
            return _sft(parsed)
    if parsed.command == "inspect":
        from burnish.inspect import Request, inspect

        arguments = {name: value for name, value in vars(parsed).items() if name != "command"}
        return inspect(Request(**arguments))
    if parsed.command == "plan":
        from burnish.plan.command import plan
        from burnish.plan.request import Request

        return plan(Request(**{name: value for name, value in vars(parsed).items() if name != "command"}))
    if parsed.command == "evaluate":
        from burnish.commands import evaluate_folder

        values = evaluate_folder(parsed.model, parsed.data, parsed.overrides)
        print(
            json.dumps(values)
            if parsed.json
            else "\n".join(f"{name:<24} {value:.4f}" for name, value in values.items())
        )
        return 0
    if parsed.command == "export":
        from burnish.commands import export_run

        print(export_run(parsed.run, parsed.step, parsed.out))
        return 0
    from burnish.generate import run_chat, run_generate

    common = {"system": parsed.system, "max_new_tokens": parsed.max_new_tokens, "temperature": parsed.temperature}
    return (
        run_chat(parsed.model, **common)
        if parsed.command == "chat"
        else run_generate(parsed.model, parsed.prompt, **common)
    )


def _sft(parsed: argparse.Namespace) -> int:
    from burnish.cluster.launch import driving

    with driving(os.environ):
        from burnish.recipe import read_recipe

        recipe = read_recipe(parsed.recipe, parsed.overrides)
        from burnish.sft import SFT

        if parsed.dry_run:
            SFT(recipe).dry_run()
            return 0
        return SFT(recipe).train().interrupted or 0
