"""One HTML file that holds all of a comparison: tables to sort, pictures, commands, versions, the plan.

It needs nothing but itself: no network, no other file; its Content-Security-Policy forbids both.
"""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bert_finetune.errors import InputError
from experiments.tables_out import Number, ResultTable

# Ending -> media type, and what such a file begins with, or holds near its beginning.
_PICTURES = {".png": ("image/png", b"\x89PNG\r\n"), ".svg": ("image/svg+xml", b"<svg")}


@dataclass(frozen=True)
class Picture:
    """A PNG or SVG file and what stands under it."""

    path: Path
    caption: str


def report_page(
    title: str,
    notes: list[str],
    measured: list[ResultTable],
    published: list[ResultTable],
    pictures: list[Picture],
    commands: dict[str, str],
    versions: ResultTable,
    plans: dict[str, str],
) -> str:
    """The report, as the text of one HTML file. Parts that are empty are left out, headings included.

    notes: what the reader should know first. measured, published: the tables, each kind in a block of its own.
    commands: run -> the command that made it. plans: where it lies -> a plan's text.
    Raises InputError for a picture that cannot be read or is neither PNG nor SVG.
    """
    blocks = {
        "Measured": map(_table, measured),
        "Published": map(_table, published),
        "Pictures": ['<div class="pictures">', *map(_picture, pictures), "</div>"] if pictures else [],
        "Commands": [_folded(name, command) for name, command in commands.items()],
        "Versions": [_table(versions)] if versions.rows else [],
        "Plan": [_folded(name, text) for name, text in plans.items()],
    }
    parts = {name: "\n".join(block) for name, block in blocks.items()}
    parts = {name: text for name, text in parts.items() if text}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in parts)
    sections = "\n".join(
        f'<section id="{name.lower()}"><h2>{name}</h2>\n{text}\n</section>' for name, text in parts.items()
    )
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        script=_SCRIPT,
        links=links,
        notes=f'<ul class="notes">{listed}</ul>' if notes else "",
        sections=sections,
    )


def _table(table: ResultTable) -> str:
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in table.header)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    title = escape(table.title)
    return (
        f'<h3>{title}</h3>\n<div class="wide" role="region" aria-label="{title}" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n{notes}"
    )


def _cell(cell: str | Number) -> str:
    if isinstance(cell, Number):
        return f'<td class="number" data-value="{float(cell.value)!r}">{escape(cell.text)}</td>'
    return f'<td class="{cell}">{cell}</td>' if cell in ("better", "worse") else f"<td>{escape(cell)}</td>"


def _picture(picture: Picture) -> str:
    caption = escape(picture.caption)
    return f'<figure><img src="{data_uri(picture.path)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def data_uri(path: Path) -> str:
    """A picture's file as a `data:` address. Raises InputError for one that cannot be read or is no PNG or SVG."""
    media, mark = _PICTURES.get(path.suffix.lower(), (None, b""))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if media is None or mark not in content[:2000]:
        raise InputError(f"{path}: is not a PNG or SVG picture")
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def _folded(name: str, text: str) -> str:
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{notes}<nav aria-label="Contents">{links}</nav></header>
<main>
{sections}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #59636e; --page: #fff; --stripe: #f5f7f9; --line: #d5dbe1;
  --link: #0a58ca; --good: #146c2e; --bad: #a8201a; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #9aa5b1; --page: #14171b; --stripe: #1c2127;
  --line: #343c45; --link: #7cb3ff; --good: #6fd08c; --bad: #ff8f87; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem); max-width: 84rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; }
h2 { margin: 2.5rem 0 .5rem; padding-bottom: .2rem; border-bottom: 2px solid var(--line); font-size: 1.35rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1.05rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
a { color: var(--link); }
p { margin: .4rem 0; max-width: 60rem; color: var(--soft); font-size: .875rem; }
.notes { margin: 0 0 1rem; padding-left: 1.2rem; max-width: 60rem; }
.wide { overflow-x: auto; max-width: 100%; width: fit-content; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; }
tbody tr:nth-child(even) td { background: var(--stripe); }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page); }
thead th { padding: 0; border-bottom: 1px solid var(--line); }
th button { all: unset; box-sizing: border-box; width: 100%; padding: .45rem .7rem; cursor: pointer; font-weight: 600; }
th button::after { content: "\\2195"; margin-left: .35em; opacity: .35; }
th[aria-sort="ascending"] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "\\2193"; opacity: 1; }
th button:hover { color: var(--link); }
:focus-visible, th button:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; padding: .4rem; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { margin-top: .3rem; color: var(--soft); font-size: .875rem; }
details { border-bottom: 1px solid var(--line); }
summary { padding: .35rem 0; cursor: pointer; }
pre { margin: 0 0 .6rem; padding: .7rem; background: var(--stripe); border-radius: 6px; font-size: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  @page { size: landscape; margin: 12mm; }
  :root { --text: #000; --soft: #333; --page: #fff; --stripe: #f4f4f4; --line: #999; --good: #000; --bad: #000; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav, th button::after { display: none; }
  .wide { overflow: visible; border: 0; width: auto; }
  table { font-size: 8pt; }
  th, td, th button { padding: .2rem .4rem; white-space: normal; }
  tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const first = [...body.rows];
  heads.forEach((head, column) => {
    const cells = first.map(row => row.cells[column]).filter(cell => cell.textContent);
    head.classList.toggle("number", cells.length > 0 && cells.every(cell => "value" in cell.dataset));
    head.firstElementChild.addEventListener("click", () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const compare = (a, b) => {
        [a, b] = [a.cells[column], b.cells[column]];
        // Unknown cells stay at the end, whichever way the others are sorted.
        if (!a.textContent || !b.textContent) return !a.textContent - !b.textContent;
        const both = "value" in a.dataset && "value" in b.dataset;
        return sign * (both ? a.dataset.value - b.dataset.value
          : a.textContent.localeCompare(b.textContent, "en", { numeric: true }));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
"""
