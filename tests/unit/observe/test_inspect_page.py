"""The page of `burnish inspect`: every token once, marked by what it weighs, and inert whatever text the data holds."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import groupby

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.observe.chart import histogram
from burnish.observe.inspect_page import render
from burnish.observe.inspection import DataWarning, InspectedRow, Inspection, PackingFill, SourceStatistics

HOSTILE = (
    "</pre></script><script>document.title='taken'</script><img src=x onerror=\"x\"> & ' \x00\x1b[31m \u202eevil\u202c"
)
VOID = ("meta", "input", "link", "img", "br")


class Element:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.text = tag, attributes, ""
        self.classes = (attributes.get("class") or "").split()


class Page(HTMLParser):
    """Elements with their attributes and text; fails where one is closed that was not open, or left open."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def tags(self):
        return [element.tag for element in self.elements]

    def by_class(self, name):
        return [element for element in self.elements if name in element.classes]

    def by_id(self, name):
        (found,) = [element for element in self.elements if element.attributes.get("id") == name]
        return found

    def table(self, number):
        """The texts of the cells of a table, a list a line."""
        text = [e for e in self.elements if e.tag in ("table", "tr", "th", "td")]
        starts = [i for i, element in enumerate(text) if element.tag == "table"]
        cells = text[starts[number] + 1 : [*starts, len(text)][number + 1]]
        lines: list[list[str]] = []
        for cell in cells:
            lines.append([]) if cell.tag == "tr" else lines[-1].append(cell.text)
        return lines


def row(tokens, index=0, source="chat", **changes):
    """A row of these (piece, origin, weight), with ids 100, 101, ..."""
    spans, start = [], 0
    for (origin, weight), run in groupby(tokens, lambda token: token[1:]):
        end = start + len(list(run))
        spans.append((start, end, origin, weight))
        start = end
    roles: dict[str, tuple[int, int]] = {}
    for _, origin, weight in tokens:
        count, trained = roles.get(origin.split(":")[0], (0, 0))
        roles[origin.split(":")[0]] = (count + 1, trained + (weight > 0))
    values = {
        "index": index,
        "source": source,
        "where": f"{source}.jsonl line {index + 1}",
        "error": None,
        "tokens": np.arange(100, 100 + len(tokens), dtype=np.int32),
        "loss_weights": np.array([weight for *_, weight in tokens], np.float32),
        "text": "".join(piece for piece, *_ in tokens),
        "pieces": tuple(piece for piece, *_ in tokens),
        "spans": tuple(spans),
        "warnings": (),
        "truncated": 0,
        "roles": roles,
    }
    return InspectedRow(**values | changes)


def chat(question="Pears?", answer="We have 7.", index=0, weight=1.0, **changes):
    """A ChatML row of a question and an answer; index 1 of its tokens is the question."""
    tokens = [("<|im_start|>user\n", "template", 0.0), (question, "user:content", 0.0)]
    tokens += [("<|im_end|>", "template:end", 0.0), ("\n<|im_start|>assistant\n", "template", 0.0)]
    tokens += [(answer, "assistant:content", weight), ("<|im_end|>", "template:end", weight), ("\n", "template", 0.0)]
    return row(tokens, index, **changes)


def failed(error, index=0, source="chat"):
    return row([], index, source, error=error)


def statistics(name="chat", **changes):
    values = {
        "name": name,
        "split": "train",
        "rows": 12,
        "errors": 2,
        "tokens": 1000,
        "trained_tokens": 250,
        "roles": {"user": (400, 0), "assistant": (300, 240), "template": (300, 10)},
        "truncated": 3,
        "tokens_cut": 77,
        "duplicates": 4,
        "lengths": np.arange(10, 110, 10, dtype=np.int32),
    }
    return SourceStatistics(**values | changes)


def inspection(rows=(), sources=(), warnings=(), packing=None, title="recipe.yaml", facts=()):
    return Inspection(title, tuple(facts), tuple(rows), tuple(sources), tuple(warnings), packing)


def full_inspection(text="text"):
    """An inspection with every part, in which `text` stands wherever text can."""
    return inspection(
        [
            chat(text, text, source=text, where=text, warnings=((text, text),), truncated=5),
            chat(index=1, source="b", spans=((0, 7, text, 0.5),), roles={text: (7, 7)}),
            failed(text, 2),
        ],
        [statistics(text, split=text, roles={text: (10, 5)}), statistics("b")],
        [DataWarning(text, text, 9, ((text, 0), (text, 70))), DataWarning("pad_is_eos", text, 0, ())],
        PackingFill(8192, 4, 0.931),
        text,
        [(text, text), ("Template", "its own")],
    )


def test_every_section_is_there():
    page = Page(render(full_inspection()))
    assert [e.attributes["id"] for e in page.elements if e.tag == "section"] == ["warnings", "data", "set-up", "rows"]
    assert "Template" in page.by_id("set-up").text
    assert "4 packs of 8,192 tokens to 93.1%" in page.by_id("data").text
    (tiles,) = page.by_class("tiles")
    assert "Rows24" in tiles.text
    assert "Errors416.7% of the rows" in tiles.text
    assert "25.0% trained" in tiles.text


def test_one_pack():
    page = Page(render(inspection([], [statistics()], packing=PackingFill(8192, 1, 0.5))))
    assert "All training rows fill 1 pack of 8,192 tokens to 50.0%." in page.by_id("data").text


def test_an_inspection_of_nothing_and_one_of_errors_alone():
    assert "Rows0" in Page(render(inspection())).by_class("tiles")[0].text
    nothing = statistics(errors=12, tokens=0, trained_tokens=0, roles={}, lengths=np.zeros(0, np.int32))
    page = Page(render(inspection([failed("no <b> turn"), failed("role 'x'", 1)], [nothing])))
    assert [e.text for e in page.by_class("error")] == ["Error no <b> turn", "Error role 'x'"]
    assert page.by_class("run") == []


def test_trained_tokens_are_marked_with_weight_origin_and_end_of_turn():
    page = Page(render(inspection([chat(answer="half\n", weight=0.5), chat(index=1)])))
    runs = page.by_class("run")[:7]
    assert [run.tag for run in runs] == ["span"] * 4 + ["mark"] * 2 + ["span"]
    assert [run.attributes["data-weight"] for run in runs] == ["0", "0", "0", "0", "0.5", "0.5", "0"]
    assert runs[4].text == "half↵\n"
    assert runs[4].attributes["data-origin"] == "assistant:content"
    assert {"partial", "shade-2", "labelled"} <= set(runs[4].classes)
    assert "labelled" not in runs[5].classes, "a weight is written where it changes"
    assert ["end" in run.classes for run in runs] == [False, False, True, False, False, True, False]
    assert ["frame" in run.classes for run in runs] == [True, False, False, True, False, False, True]
    whole = page.by_class("run")[11]
    assert (whole.tag, whole.text, whole.classes) == ("mark", "We have 7.", ["run"])
    assert "7 tokens · 2 trained (28.6%): template 1 of 5, assistant 1 of 1" in page.by_id("row-1").text


def test_weights_have_shades_by_quarters_and_more_than_one_is_told_apart():
    weights = [0.1, 0.25, 0.6, 0.99, 1.0, 2.0]
    page = Page(render(inspection([row([(f"{weight}", "assistant:content", weight) for weight in weights])])))
    shades = [[name for name in run.classes if name.startswith(("shade", "over"))] for run in page.by_class("run")]
    assert shades == [["shade-0"], ["shade-1"], ["shade-2"], ["shade-3"], [], ["over"]]


def units(page):
    """(start, ids, text) of each unit of tokens that the page's script would show as one."""
    for run in page.by_class("run"):
        ids = [[int(i) for i in unit.split("+")] for unit in run.attributes["data-ids"].split(" ")]
        lengths = [int(length) for length in run.attributes["data-lengths"].split(" ")]
        text, at = run.text.encode("utf-16-le"), 0
        assert len(ids) == len(lengths)
        assert 2 * sum(lengths) == len(text)
        start = int(run.attributes["data-start"])
        for own, length in zip(ids, lengths, strict=True):
            yield start, own, text[at : at + 2 * length].decode("utf-16-le")
            at, start = at + 2 * length, start + len(own)


def test_tokens_that_are_parts_of_one_character_are_shown_together():
    tokens = [("Hi", "a", 1.0), ("👋", "a", 1.0), ("", "a", 1.0), ("", "a", 1.0), ("", "a", 0.0), ("🦀\n", "a", 1.0)]
    page = Page(render(inspection([row(tokens)])))
    expected = [(0, [100], "Hi"), (1, [101, 102, 103], "👋"), (4, [104], "⋯"), (5, [105], "🦀↵\n")]
    assert list(units(page)) == expected, "a part that weighs something else has a sign of its own"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec=None), max_size=8)
            | st.sampled_from(["", "\n", "\r\n", "</pre>", "👨‍👩‍👧", HOSTILE]),
            st.sampled_from(["user:content", "assistant:content", "template", "template:end"]),
            st.sampled_from([0.0, 0.5, 1.0]),
        ),
        min_size=1,
    )
)
def test_every_token_is_shown_once_whatever_its_text(tokens):
    text = render(inspection([row(tokens)]))
    text.encode()
    found = list(units(Page(text)))
    assert [number for _, ids, _ in found for number in ids] == list(range(100, 100 + len(tokens)))
    assert [start for start, *_ in found] == [ids[0] - 100 for _, ids, _ in found]


def test_what_cannot_be_seen_is_shown():
    page = Page(render(inspection([chat("a\u202eb\x00c\x85\ud800\ufeff", "\r\n")])))
    texts = [text for *_, text in units(page)]
    assert texts[1] == "a⟦U+202E⟧b␀c⟦U+0085⟧?⟦U+FEFF⟧"
    assert texts[4] == "␍↵\n"


def test_no_text_of_the_data_becomes_markup():
    page, harmless = Page(render(full_inspection(HOSTILE))), Page(render(full_inspection()))
    assert page.tags() == harmless.tags(), "the same elements, whatever the text"
    assert [set(e.attributes) for e in page.elements] == [set(e.attributes) for e in harmless.elements]
    assert page.tags().count("script") == 1
    assert not [name for e in page.elements for name in e.attributes if name.startswith("on") or name == "style"]
    references = [v for e in page.elements for n, v in e.attributes.items() if n in ("src", "href", "action")]
    assert all(re.fullmatch("#[a-z0-9-]+", reference or "") for reference in references)
    assert not re.search("[\x00\x1b\u202e]", render(full_inspection(HOSTILE)))


def test_a_long_row_is_shown_from_both_ends_and_says_so():
    tokens = [(f"t{number} ", "assistant:content", 1.0) for number in range(100_000)]
    text = render(inspection([row(tokens)]))
    page = Page(text)
    starts = [(start, own) for start, own, _ in units(page)]
    assert (len(starts), starts[0], starts[-1]) == (20_000, (0, [100]), (99_999, [100_099]))
    assert "80,000 tokens are not shown" in page.by_id("row-0").text
    assert "100,000 tokens · 100,000 trained" in page.by_id("row-0").text
    assert len(page.by_class("run")) == 2, "not an element a token"


def test_a_token_of_endless_text_is_cut():
    page = Page(render(inspection([row([("x" * 50_000, "user:content", 0.0)])])))
    assert "49,000 characters of this token are not shown" in page.by_class("run")[0].text
    assert len(page.by_class("run")[0].text) < 1_100


def test_many_rows_are_cut_in_number_and_length():
    long, short = [("ab ", "user:content", 0.0)] * 2_500, [("ab", "user:content", 0.0)]
    rows = [row(short, index) for index in range(499)] + [row(long, index) for index in range(499, 510)]
    page = Page(render(inspection(rows, [statistics(rows=900)])))
    assert len(page.by_class("row")) == 500
    assert page.by_class("legend")[0].text.startswith("500 rows of 900 in detail.")
    assert "500 tokens are not shown" in page.by_id("row-499").text


def test_warnings_link_to_rows_that_are_shown_and_name_the_others():
    rows = [chat(index=3), chat(index=7, source="b")]
    found = DataWarning("empty_turn", "A turn is empty.", 50, (("chat", 3), ("b", 7), ("chat", 1200)))
    warnings = [found, DataWarning("pad_is_eos", "Pad is eos.", 0, ())]
    page = Page(render(inspection(rows, [statistics(rows=2000)], warnings)))
    first, second = [e.text for e in page.elements if e.tag == "li"]
    assert first.startswith("empty_turn50 of 2,000 rowsA turn is empty.")
    assert "Rows of chat 3; b 7. Not shown below: rows of chat 1,200. 47 more are not listed." in first
    links = [(e.attributes["href"], e.text) for e in page.elements if e.tag == "a" and "#row-" in e.attributes["href"]]
    assert links == [("#row-0", "3"), ("#row-1", "7")]
    assert second == "pad_is_eosPad is eos.", "no count where no row is to blame"


def test_a_warning_links_to_the_first_of_the_samples_that_a_row_gives():
    rows = [chat(), chat(index=4), chat(index=4)]
    page = render(inspection(rows, warnings=[DataWarning("empty_turn", "A turn is empty.", 1, (("chat", 4),))]))
    assert '<a href="#row-1">4</a>' in page


def test_tables_have_a_line_a_source_and_their_sum():
    one = np.array([600], np.int32)
    other = statistics(
        "b", split="validation", rows=1, errors=0, tokens=600, trained_tokens=150, truncated=0, lengths=one
    )
    page = Page(render(inspection(sources=[statistics(), other])))
    head, first, second, total = page.table(0)
    assert head[:4] == ["Source", "Split", "Rows", "Errors"]
    assert first[:9] == ["chat", "train", "12", "2", "1.00 k", "25.0%", "4", "3", "77"]
    assert second[:6] == ["b", "validation", "1", "0", "600", "25.0%"]
    assert total[:9] == ["All", "", "13", "2", "1.60 k", "25.0%", "8", "3", "154"]
    assert first[9:12] == ["50", "90", "100"]
    assert len(Page(render(inspection(sources=[other]))).table(0)) == 2, "no sum of one"
    turns = statistics("turns", rows=5, errors=1, dropped=1)
    head, first, second, _ = Page(render(inspection(sources=[other, turns]))).table(0)
    assert head[2:6] == ["Rows", "Samples", "Errors", "Dropped"]
    assert (first[2:6], second[2:6]) == (["1", "1", "0", "0"], ["5", "12", "1", "1"])


def test_the_trained_share_is_given_by_role_and_source():
    other = statistics("b", roles={"tool": (100, 0), "assistant": (100, 100)})
    page = Page(render(inspection(sources=[statistics(), other])))
    head, first, second, total = page.table(1)
    assert head == ["Source", "Split", "user", "tool", "assistant", "template"]
    assert first[2:] == ["0.0% of 400", "-", "80.0% of 300", "3.3% of 300"]
    assert second[2:] == ["-", "0.0% of 100", "100.0% of 100", "-"]
    assert total[4] == "85.0% of 400"


def test_rows_can_be_filtered_by_what_they_have():
    rows = [chat(warnings=(("double_bos", "x"),)), chat(index=1, source="b", truncated=3), failed("no turn", 2)]
    rows += [chat(index=3, warnings=(("empty_turn", "x"), ("double_bos", "y"), ("double_bos", "z")))]
    page = Page(render(inspection(rows)))
    flags = [(e.attributes["data-source"], e.attributes["data-flags"]) for e in page.by_class("row")]
    assert flags == [("0", "warning warning-0"), ("1", "cut"), ("0", "error"), ("0", "warning warning-0 warning-1")]
    options = {e.attributes["value"]: e.text for e in page.elements if e.tag == "option"}
    assert options["warning-0"] == "warning: double_bos (2)"
    assert (options["cut"], options["error"], options["1"]) == ("cut rows (1)", "errors (1)", "b")
    assert "<select" not in render(inspection([chat(), chat(index=1)])), "nothing to choose"


def test_a_histogram_draws_each_bin_at_its_height():
    figure = histogram("Lengths", "tokens", (0, 10, 20, 30), (5, 0, 10), "tokens")
    heights = [float(height) for height in re.findall(r'class="bar"[^>]* height="([\d.]+)%"', figure)]
    assert heights[0] * 2 == heights[2] > 90
    assert heights[1] == 0
    assert "20 to 29 tokens: 10 rows" in figure


# A page that is only dumped draws no frames, and so sees nothing come into view.
ALL_IN_VIEW = """
window.IntersectionObserver = class {
  constructor(callback) { this.callback = callback; }
  observe(target) { this.callback([{isIntersecting: true, target}]); }
  unobserve() {}
  disconnect() {}
};
"""

DRIVE = """
const said = [], say = (value) => said.push(value), key = (name) =>
  document.dispatchEvent(new KeyboardEvent("keydown", {key: name, cancelable: true}));
const wait = () => new Promise((done) => setTimeout(done, 300));
const shown = () => [...document.querySelectorAll(".row:not([hidden])")].map((row) => row.id).join(" ");
const choose = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("change"));
};
(async () => {
  key("j"); key("j"); say(document.activeElement.id);
  key("k"); say(document.activeElement.id);
  const run = document.querySelectorAll(".run")[4], box = run.getClientRects()[0];
  run.dispatchEvent(new PointerEvent("pointerover", {bubbles: true, clientX: box.left + 3, clientY: box.top + 3}));
  say(document.getElementById("tip").textContent);
  choose("flag", "error"); say(shown()); say(document.getElementById("count").textContent);
  location.hash = "#row-1"; await wait(); say(shown());
  choose("source", "1"); say(shown());
  choose("source", ""); say(document.querySelectorAll("#row-0 .run > i").length);
  key("b"); say(document.querySelectorAll("#row-0 .run > i").length);
  const output = document.createElement("output");
  output.textContent = JSON.stringify(said);
  document.body.append(output);
})();
"""


def test_a_browser_filters_jumps_and_takes_runs_apart(tmp_path, browse):
    rows = [chat(HOSTILE, "Pe</b>"), chat(index=1, source="b"), failed("no turn", 2)]
    page = render(inspection(rows, [statistics()]))
    path = tmp_path / "page.html"
    path.write_text(page)
    document, console = browse(path)
    assert console == [], "no error, and nothing refused by the content security policy"
    assert "<title>taken" not in document
    free = re.sub('<meta http-equiv="Content-Security-Policy"[^>]+>', "", page)
    driven = free.replace("<body>", f"<body><script>{ALL_IN_VIEW}</script>")
    path.write_text(driven.replace("</body>", f"<script>{DRIVE}</script></body>"))
    document, console = browse(path)
    assert console == []
    (said,) = re.findall("<output>(.*)</output>", document)
    assert said.replace("&lt;", "<").replace("&gt;", ">") == (
        '["row-1","row-0","\\"Pe</b>\\"\\ntoken 4, id 104\\nweight 1, assistant:content",'
        '"row-2","1 of 3 rows","row-0 row-1 row-2","row-1",1,7]'
    )
