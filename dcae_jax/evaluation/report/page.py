"""A page of HTML that opens from disk: tables, pictures and facts.

It is one file that asks no network for anything, and refers to pictures and
numbers beside it. Without its script, tables and pictures are as they are.
"""

import html
import re
import time
import urllib.parse
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from dcae_jax.runs import plain_text

# What a cell begins with, such as 1,024 or 20.1 (19.8 to 20.4).
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?(?=[\s,]|$)")
_ARROW = re.compile(" (?=.$)")  # lines do not end before it
_BEST = {"↑": max, "↓": min}  # by the arrow at the end of a head


class Part(NamedTuple):
  """A heading, and the HTML below it."""

  title: str
  body: str


def document(
  title: str, about: Mapping[str, str], parts: Sequence[Part]
) -> str:
  """A page: `about`, as `facts` have it, a list of contents, and the parts.

  Control characters, which names of files may hold, become escapes.
  """
  title = html.escape(title)
  written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
  contents = "".join(
    f"<li><a href='#part-{i}'>{html.escape(part.title)}</a></li>"
    for i, part in enumerate(parts)
  )
  body = "\n".join(
    f"<section id=part-{i}><h2>{html.escape(part.title)}</h2>\n"
    f"{part.body}</section>"
    for i, part in enumerate(parts)
  )
  whole = (
    "<!doctype html>\n<html lang=en><meta charset=utf-8>"
    "<meta name=viewport content='width=device-width, initial-scale=1'>"
    f"<title>{title}</title><style>{_STYLE}</style>\n<h1>{title}</h1>\n"
    f"{facts({'written': written, **about})}\n"
    f"<nav aria-label=Contents><ol>{contents}</ol></nav>\n"
    f"{body}\n<script>{_SCRIPT}</script></html>\n"
  )
  return plain_text.escaped(whole, kept="\n\t")


def facts(about: Mapping[str, str]) -> str:
  """A list of names, which are escaped here, and what is said of them: HTML."""
  lines = "".join(
    f"<dt>{html.escape(name)}</dt><dd>{text}</dd>"
    for name, text in about.items()
  )
  return f"<dl>{lines}</dl>"


def table(
  rows: Sequence[Sequence[str]], kinds: Sequence[Hashable] | None = None
) -> str:
  """The first row is heads; each column can be sorted by.

  The best numbers of columns whose heads end with an arrow are bold, among rows
  of the same kind; None: all rows compare. A row with none like it has no best.
  """
  header, *rows = rows
  kinds = kinds or [None] * len(rows)
  columns = [
    _column(head, cells, kinds)
    for head, *cells in zip(header, *rows, strict=True)
  ]
  head = "".join(
    f"<th scope=col>{_ARROW.sub('&nbsp;', html.escape(cell))}</th>"
    for cell in header
  )
  body = "\n".join(
    f"<tr>{''.join(row)}</tr>" for row in zip(*columns, strict=True)
  )
  return (
    f"<div class=wide><table><thead><tr>{head}</tr></thead>\n"
    f"<tbody>{body}</tbody></table></div>"
  )


def _column(
  head: str, cells: Sequence[str], kinds: Sequence[Hashable]
) -> list[str]:
  """Its cells below the head; equal to a reader is equally good."""
  numbers = [_number(cell) for cell in cells]
  by_kind = {}
  for kind, number in zip(kinds, numbers, strict=True):
    if number is not None:
      by_kind.setdefault(kind, []).append(number)
  best = _BEST.get(head[-1:])
  made = []
  for cell, kind, number in zip(cells, kinds, numbers, strict=True):
    text, sorted_by = html.escape(cell), ""
    if number is not None:
      sorted_by = f" data-number={number}"
      alike = by_kind[kind]
      if best and len(alike) > 1 and number == best(alike):
        text = f"<b>{text}</b>"
    made.append(f"<td{sorted_by}>{text}</td>")
  return made


def _number(cell: str) -> float | None:
  found = _NUMBER.match(cell)
  return float(found[0].replace(",", "")) if found else None


def picture(file: str, alt: str, of_class: str) -> str:
  """A picture beside the page; a link to it, which the script shows large."""
  file, alt = html.escape(_address(file)), html.escape(alt)
  return (
    f"<a class='zoom {of_class}' href='{file}'>"
    f"<img loading=lazy src='{file}' alt='{alt}'></a>"
  )


def sheet(file: str, alt: str, of_class: str = "") -> str:
  """A wide picture with small texts; a narrow window scrolls it."""
  return f"<div class=wide>{picture(file, alt, f'sheet {of_class}')}</div>"


def plot(file: str, alt: str) -> str:
  """One of lines on white, which a dark scheme turns dark."""
  return sheet(file, alt, "plot")


def link(text: str, file: str) -> str:
  """To a file beside the page."""
  return f"<a href='{html.escape(_address(file))}'>{html.escape(text)}</a>"


def _address(file: str) -> str:
  return urllib.parse.quote(file)


def folded(title: str, body: str) -> str:
  """HTML that is shown when its title is clicked."""
  return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


_STYLE = """
:root{color-scheme:light dark;--ink:#1c1917;--paper:#fff;--faint:#57534e;
--line:#d6d3d1;--link:#1d4ed8;--plot:none;
--0:#2563eb;--1:#d97706;--2:#059669;--3:#db2777;--4:#7c3aed;--5:#57534e}
@media(prefers-color-scheme:dark){:root{--ink:#e7e5e4;--paper:#191716;
--faint:#a8a29e;--line:#44403c;--link:#93c5fd;
--plot:invert(.9) hue-rotate(180deg);
--0:#60a5fa;--1:#fbbf24;--2:#34d399;--3:#f472b6;--4:#a78bfa;--5:#a8a29e}}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1400px;
padding:0 1rem;color:var(--ink);background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin:2.4rem 0 .8rem}
h3{font-size:1rem;margin:1.6rem 0 .6rem}
a{color:var(--link)}
dl{display:grid;grid-template-columns:fit-content(40%) 1fr;gap:.2rem 1rem;
font-size:.9rem}
dt{color:var(--faint)}dd{margin:0}
nav ol{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:0;padding:.8rem 0;
list-style:none;border:solid var(--line);border-width:1px 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}
th{vertical-align:bottom;white-space:normal;overflow-wrap:normal;min-width:4em}
th:first-child,td:first-child{text-align:left;white-space:normal;
max-width:min(20em,40vw);overflow-wrap:break-word;position:sticky;left:0;
background:var(--paper)}
th button{all:unset;cursor:pointer}
th button:focus-visible{outline:2px solid var(--link)}
th[aria-sort] button{text-decoration:underline}
.notes{color:var(--faint);font-size:.9rem}
img{display:block;width:100%}
.zoom{display:block;cursor:zoom-in}
a.plot{margin-top:1rem}.plot img{filter:var(--plot)}
.sheet img{width:auto;max-width:max(100%,60rem)}
.pixels img,dialog.pixels img{image-rendering:pixelated}
dialog{border:0;padding:.5rem;width:100vw;height:100dvh;max-width:none;
max-height:none;background:#111;color:#fff;cursor:zoom-out}
dialog[open]{display:flex;flex-direction:column;gap:.5rem}
dialog img{flex:1;min-height:0;object-fit:contain}
dialog.sheet img{min-width:60rem}
dialog form{position:sticky;left:0;display:flex;gap:1rem;
justify-content:space-between}
.figures{display:flex;flex-wrap:wrap;gap:1.5rem}
figure{margin:0;flex:0 1 calc(var(--columns)*215px)}
figcaption{font-weight:600;margin-bottom:.3rem}
.tiles{display:grid;gap:.4rem .8rem;
grid-template-columns:repeat(auto-fill,minmax(min(200px,45%),1fr))}
.tiles>div{display:grid;grid-template-rows:subgrid;grid-row:span 4;
align-content:start}
.tiles p{font-size:.85rem;margin:0}
.tiles select{width:48%}
.tiles input{width:100%;margin:.3rem 0 0}
.slider{position:relative}
.left{position:absolute;inset:0;clip-path:inset(0 50% 0 0)}
.charts{display:flex;flex-wrap:wrap;gap:1.2rem;font-size:.85rem}
.charts div{width:320px;max-width:100%}
.charts svg{max-width:100%}
svg text{font-size:11px;fill:var(--faint)}
pre{white-space:pre-wrap;font-size:.8rem}
"""
_SCRIPT = """
for(const table of document.querySelectorAll('table'))
table.querySelectorAll('th').forEach((head,column)=>{
const button=document.createElement('button');
button.append(...head.childNodes);head.append(button);
button.addEventListener('click',()=>{
const sign=head.ariaSort==='ascending'?-1:1;
for(const other of table.querySelectorAll('th'))other.ariaSort=null;
head.ariaSort=sign>0?'ascending':'descending';
const compare=(a,b)=>{
const [x,y]=[a,b].map(row=>row.cells[column]);
const [m,n]=[x,y].map(cell=>parseFloat(cell.dataset.number));
if(isNaN(m)||isNaN(n))return isNaN(m)-isNaN(n)
||sign*x.textContent.localeCompare(y.textContent,undefined,{numeric:true});
return sign*(m-n)};
const body=table.tBodies[0];
body.append(...[...body.rows].sort(compare))})});
const dialog=document.createElement('dialog');
dialog.innerHTML='<form method=dialog><span></span>'
+'<button aria-label=Close>✕</button></form><img alt="">';
dialog.addEventListener('click',()=>dialog.close());
document.body.append(dialog);
for(const link of document.querySelectorAll('.zoom'))
link.addEventListener('click',event=>{
if(event.ctrlKey||event.metaKey||event.shiftKey)return;
event.preventDefault();
dialog.className=link.className.replace('zoom','');
dialog.querySelector('img').src=link.href;
dialog.querySelector('span').textContent=link.firstChild.alt;
dialog.showModal()});
for(const figure of document.querySelectorAll('figure')){
const [left,right]=['.left','.right'].map(side=>figure.querySelector(side));
const show=(side,choice)=>choice.addEventListener('change',()=>{
side.href=side.firstChild.src=choice.value;
side.firstChild.alt=choice.selectedOptions[0].text});
const [a,b]=figure.querySelectorAll('select');
show(left,a);show(right,b);
figure.querySelector('input').addEventListener('input',event=>{
left.style.clipPath=`inset(0 ${100-event.target.value}% 0 0)`})}
"""
