"""report.html: whole, small, and inert whatever text the data holds."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from burnish.observe.report import Generation, LengthDistribution, RenderedSample, Report, SourceSummary, write_report

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & ' \x00\x1b[31m"
)


def metrics(num_steps: int, evaluate_every: int | None = 100, sources: tuple[str, ...] = ()) -> list[dict]:
    def held_out(step):
        return {"step": step, "eval/loss": 3.0 - step / num_steps, "eval/a/loss": 3.0, "eval/b/loss": 2.0}

    lines = [held_out(0)] if evaluate_every else []
    for step in range(1, num_steps + 1):
        line = {"step": step, "loss": 2 + math.exp(-step / 100), "lr": 1e-5, "grad_norm": 0.5 + step % 7}
        line |= {
            "tokens_per_second": 1800.0 + step % 50,
            "total_tokens": 4000 * step,
            "total_trained_tokens": 1000 * step,
        }
        line |= {"time/forward_backward": 2.0, "time/data_wait": 0.01}
        lines.append(line | {f"loss/{source}": 2.0 for source in sources})
        if evaluate_every and step % evaluate_every == 0:
            lines.append(held_out(step))
    return lines


def full_report(text: str = "text", num_steps: int = 300) -> Report:
    """A report with every section, in which `text` stands wherever text can."""
    return Report(
        title=text,
        facts=[("Model", text), (text, "bf16")],
        summary=[("Runtime", "3:07"), (text, text)],
        metrics=metrics(num_steps, sources=("a", text)),
        sources=[
            SourceSummary(text, "train", 110, 100, {text: 10}, 2, 5000, 1000, LengthDistribution.of(range(1, 101))),
            SourceSummary("b", "validation", 10, 10, {}, 0, 500, 100),
        ],
        samples=[RenderedSample(text, 3, [("<|im_start|>", 0), (text, 0), (text, 1), ("half", 0.5)])],
        generations=[Generation(step, text, f"{text} {step}") for step in range(0, 3000, 100)],
        recipe=f"model:\n  path: {text}\n",
    )


class Page(HTMLParser):
    """Elements with their attributes, and the text below each id and in each <pre>."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pre: list[str] = []
        self._in_pre = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "pre":
            self._in_pre += 1
            self.pre.append("")

    def handle_endtag(self, tag):
        self._in_pre -= tag == "pre"

    def handle_data(self, data):
        if self._in_pre:
            self.pre[-1] += data

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def written(tmp_path, report: Report) -> str:
    path = tmp_path / "report.html"
    write_report(path, report)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_all_sections_are_there_and_the_recipe_reads_back(tmp_path):
    page = Page(written(tmp_path, full_report()))
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert ids == ["curves", "data", "samples", "generations", "run", "recipe"]
    assert page.pre[-1] == "model:\n  path: text\n"
    charts = [
        attributes["aria-label"] for tag, attributes in page.elements if tag == "svg" and "aria-label" in attributes
    ]
    titles = [label.split(":")[0] for label in charts]
    assert titles[:3] == ["Loss", "Training loss by source", "Held-out loss by source"]
    assert {"Learning rate", "Gradient norm", "Tokens per second"} <= set(titles)
    assert "held-out 3.0000 at step 0, 2.0000 at step 300" in charts[0]


def test_no_text_of_the_data_becomes_markup(tmp_path):
    text = written(tmp_path, full_report(HOSTILE))
    page, harmless = Page(text), Page(written(tmp_path, full_report("text")))
    assert page.tags() == harmless.tags(), "the same elements, whatever the text"
    assert page.tags().count("script") == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    references = [v for _, attributes in page.elements for n, v in attributes.items() if n in ("src", "href", "action")]
    assert all(reference.startswith("#") for reference in references)
    shown = HOSTILE.replace("\x00", "␀").replace("\x1b", "␛")
    assert page.pre[0] == f"<|im_start|>{shown}{shown}half"


def test_the_page_may_run_and_load_nothing_but_its_own_style_and_script(tmp_path):
    text = written(tmp_path, full_report())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        assert "url(" not in content
        assert "http" not in content
    assert "style=" not in text, "the policy would ignore it"


def test_trained_tokens_are_marked_with_their_weight(tmp_path):
    pieces = [("user\n", 0.0), ("Yes", 1.0), (".", 1.0), ("\n", 1.0), ("maybe", 0.25)]
    text = written(tmp_path, Report("r", [], [], [], samples=[RenderedSample("chat", 41, pieces)]))
    assert 'user\n<mark>Yes.↵\n</mark><mark class="partial" title="weight 0.25">maybe</mark></pre>' in text
    assert "chat, row 41: 5 tokens, 4 trained" in text


def test_a_sample_that_is_too_long_is_cut_and_says_so(tmp_path):
    pieces = [("ab", 0.0)] * 9_000 + [("cd", 1.0)] * 9_000
    text = written(tmp_path, Report("r", [], [], [], samples=[RenderedSample("chat", 0, pieces)]))
    assert "16,000 characters not shown" in text
    assert text.count("cd") == 1_000


def test_answers_are_shown_by_prompt_over_time_first_and_last_among_them(tmp_path):
    answers = [Generation(step, prompt, f"answer {prompt} {step}") for step in range(100) for prompt in ("p", "q")]
    page = Page(written(tmp_path, Report("r", [], [], [], generations=answers)))
    assert page.pre[0] == "p"
    shown = [pre for pre in page.pre if pre.startswith("answer p")]
    assert (shown[0], shown[-1], len(shown)) == ("answer p 0", "answer p 99", 12)
    assert page.pre[13] == "q"


@pytest.mark.parametrize("evaluate_every", [None, 1])
def test_a_run_of_one_step(tmp_path, evaluate_every):
    text = written(tmp_path, Report("r", [("a", "b")], [], metrics(1, evaluate_every)))
    assert ("Held-out loss" in text) == bool(evaluate_every)
    assert "nan" not in text.split("<main>")[1].split("</main>")[0]


def test_a_run_that_has_not_begun(tmp_path):
    text = written(tmp_path, Report("r", [], [], []))
    assert "<section" not in text


def test_values_that_were_not_finite_are_left_out(tmp_path):
    lines = metrics(20, None)
    lines[-1]["loss"] = lines[5]["loss"] = lines[5]["grad_norm"] = None
    text = written(tmp_path, Report("r", [], [], lines))
    assert "training not finite" in text
    assert "None" not in text


def test_ten_thousand_lines_make_a_small_page(tmp_path):
    text = written(tmp_path, full_report(num_steps=10_000))
    assert len(text) < 400_000


def test_text_without_utf8_can_be_written(tmp_path):
    assert "half ? of" in written(tmp_path, full_report("half \ud83d of a pair"))


def test_the_length_distribution_counts_every_row_once():
    lengths = np.random.default_rng(0).integers(1, 4096, 5000)
    of = LengthDistribution.of(lengths)
    assert of is not None
    assert sum(of.counts) == 5000
    assert len(of.edges) == len(of.counts) + 1
    assert of.edges[-2] <= of.longest < of.edges[-1], "the last bin holds the longest row"
    inside = ((lengths >= of.edges[3]) & (lengths < of.edges[4])).sum()
    assert of.counts[3] == inside
    assert (of.longest, of.median) == (lengths.max(), np.percentile(lengths, 50, method="lower"))
    assert LengthDistribution.of([]) is None
    single = LengthDistribution.of([7])
    assert single is not None
    assert (sum(single.counts), single.median) == (1, 7)


def test_a_browser_draws_it_without_a_complaint(tmp_path, browse):
    path = tmp_path / "report.html"
    write_report(path, full_report(HOSTILE))
    document, console = browse(path)
    assert console == [], "no error, and nothing refused by the content security policy"
    assert document.count('<figure class="chart">') == 7
    assert "<title>taken" not in document
    assert "<img" not in document
    path.write_text(path.read_text().replace("</main>", "<img src='https://example.com/x.png'></main>"))
    _, console = browse(path)
    assert any("Content Security Policy" in line for line in console), "a request would have been seen"
