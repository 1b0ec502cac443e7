"""How the pages look: light and dark, from a phone's width to a screen's."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1f24; --soft: #5c6670; --line: #d8dee4; --panel: #f6f8fa; --mark: #ffe58a;
  --c0: #6b7785; --c1: #2563eb; --c2: #0f8a5f; --c3: #a855f7; --good: #0f7b4f; --bad: #b42318; --even: #6b7785 }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f1318; --ink: #e4e8ec; --soft: #9aa5b1; --line: #2c343d; --panel: #171d24; --mark: #6b5a12;
    --c0: #a3afbc; --c1: #7aa7ff; --c2: #5fd9a8; --c3: #c9a0ff; --good: #5fd9a8; --bad: #ff9c92; --even: #a3afbc }
}
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; background: var(--back); color: var(--ink) }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
h3 { font-size: .95rem; margin: 1rem 0 .3rem }
p { margin: .4rem 0; overflow-wrap: anywhere }
.soft { color: var(--soft) }
.verdict { border-left: .3rem solid var(--even); background: var(--panel); padding: .6rem .9rem;
  margin: .9rem 0; font-size: 1.05rem; overflow-wrap: anywhere }
.verdict.verdict { color: var(--ink) }
.verdict.better { border-color: var(--good) }
.verdict.worse { border-color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse }
td, th { padding: .22rem .9rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--soft) }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
table.facts td { overflow-wrap: anywhere; min-width: 8rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.2rem }
figure { margin: 0; min-width: 0; position: relative }
figcaption { font-weight: 600; overflow-wrap: anywhere }
svg { width: 100%; display: block }
svg text { font-size: 11px; fill: currentColor; paint-order: stroke; stroke: var(--back); stroke-width: 3px; stroke-linejoin: round }
svg text.word { fill: var(--soft) }
.grid { stroke: var(--line) }
.mark { stroke: var(--soft); stroke-dasharray: 3 3; opacity: .7 }
.whisker { stroke: currentColor; stroke-width: 1.5 }
.cursor { stroke: currentColor; opacity: .5 }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.c0 { stroke: var(--c0) }
.b0 { fill: var(--c0) }
svg text.t0 { fill: var(--c0) }
.c1 { stroke: var(--c1) }
.b1 { fill: var(--c1) }
svg text.t1 { fill: var(--c1) }
.c2 { stroke: var(--c2) }
.b2 { fill: var(--c2) }
svg text.t2 { fill: var(--c2) }
.c3 { stroke: var(--c3) }
.b3 { fill: var(--c3) }
svg text.t3 { fill: var(--c3) }
.dashed { stroke-dasharray: 5 3 }
.alone .c0 { stroke: var(--c1) }
.alone .b0 { fill: var(--c1) }
.at { position: absolute; right: 0; top: 0; font-size: .8rem; color: var(--soft); font-variant-numeric: tabular-nums; background: var(--back) }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .8rem;
  overflow: auto; max-height: 26rem; font-size: .82rem; margin: 0 }
button, select, input { font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .6rem; min-height: 2.2rem }
button { cursor: pointer }
button:focus-visible, input:focus-visible, select:focus-visible, .list:focus-visible { outline: 2px solid var(--c1); outline-offset: 1px }
button[aria-pressed=true] { border-color: var(--c1); box-shadow: inset 0 0 0 1px var(--c1) }
.copy { position: relative }
.copy > button { position: absolute; right: 0; bottom: calc(100% + .2rem) }
.bar { display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0; align-items: center }
.bar input { flex: 1 1 14rem; min-width: 0 }
.browser { display: grid; grid-template-columns: minmax(16rem, 2fr) 3fr; gap: .8rem; height: 36rem }
.list, .detail { border: 1px solid var(--line); border-radius: .4rem; overflow: auto; min-width: 0; min-height: 0 }
.sheet { position: relative }
.row { position: absolute; left: 0; right: 0; height: 48px; padding: .25rem .6rem; border-bottom: 1px solid var(--line); cursor: pointer; overflow: hidden }
.row div { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; line-height: 1.35 }
.row .soft { font-size: .8rem }
.row[aria-selected=true] { background: var(--panel); box-shadow: inset .25rem 0 0 var(--c1) }
.fixed, .better { color: var(--good) }
.broken, .worse { color: var(--bad) }
.unchanged, .unscored, .scored, .mixed { color: var(--even) }
.detail { padding: .2rem .9rem .9rem }
.detail .text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel);
  border-radius: .4rem; padding: .45rem .6rem; margin: .15rem 0 .5rem }
.detail .answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: .8rem }
mark { background: var(--mark); color: inherit }
@media (max-width: 44rem) {
  .browser { grid-template-columns: 1fr; height: auto }
  .list { height: 17rem }
  .detail { max-height: none }
  body { padding: .8rem .7rem 3rem }
  td, th { padding-right: .6rem }
}
@media print {
  .bar, .copy > button { display: none }
  .list { display: none }
  .browser { display: block; height: auto }
}
"""
