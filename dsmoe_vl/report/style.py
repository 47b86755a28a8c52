"""How a report looks, on any screen, in light and dark. One style sheet, no script, no file beside it."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1d2127; --soft: #5d6672; --rule: #dcdfe3;
  --heat: #1f66b5; --on-heat: #ffffff; --line: #1f66b5; --truth: #8a8f98; --key: #c64600; --right: #1b7a3d;
  --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2126; --ink: #e6e8eb; --soft: #a2abb6;
  --rule: #363c44; --heat: #5aa2ee; --on-heat: #0d1116; --line: #6db0f5; --truth: #8f97a2; --key: #ff9553;
  --right: #62c587; --wrong: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1080px; padding: 20px 16px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.25rem; margin: 48px 0 4px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 28px 0 8px; }
h4 { font-size: 0.95rem; margin: 16px 0 8px; font-weight: 600; color: var(--soft); }
p { margin: 4px 0 12px; max-width: 75ch; }
a { color: var(--line); }
nav a { display: inline-block; margin: 4px 14px 0 0; }
.note, .facts, figcaption, dt { color: var(--soft); font-size: 0.88rem; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; overflow-wrap: normal; }
tbody th { font-weight: 400; min-width: 9rem; }
td.number, th.number { text-align: right; padding: 5px 0 5px 14px; }
td.number { white-space: nowrap; }
th.number { min-width: 4.2rem; }
@media (max-width: 600px) { table { font-size: 0.85rem; } tbody th { min-width: 7rem; } }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); }
.card, .query, .video { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px;
  margin: 0; min-width: 0; }
.video { margin-bottom: 14px; }
.queries { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); }
.key { color: var(--soft); font-size: 0.78rem; }
.pictures { display: flex; gap: 4px; margin-bottom: 8px; }
.pictures img { min-width: 0; flex: 1 1 0; width: 0; height: auto; align-self: center; }
.pictures img:only-child { height: 180px; object-fit: contain; object-position: left; }
img { display: block; max-width: 100%; border-radius: 4px; }
dl { margin: 0; }
dt { margin-top: 6px; }
dd { margin: 0; }
.mark { display: inline-block; font-size: 0.82rem; font-weight: 600; }
.found .mark { white-space: nowrap; font-size: 0.76rem; }
.is-right { color: var(--right); }
.is-wrong { color: var(--wrong); }
.asked { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: center; margin-bottom: 10px; }
.asked img { width: auto; height: 112px; object-fit: contain; flex: none; }
.asked p { margin: 0; font-weight: 600; }
ol.found { list-style: none; margin: 0; padding: 0; }
ol.texts li { display: grid; grid-template-columns: 3.4rem 1fr; gap: 8px; padding: 3px 8px; border-left: 3px solid
  transparent; }
ol.media { display: grid; gap: 4px; grid-template-columns: repeat(5, minmax(0, 1fr)); }
ol.media li { border: 3px solid transparent; border-radius: 7px; padding: 3px; min-width: 0; font-size: 0.82rem; }
ol.media img, .no-picture { width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; }
.no-picture { display: grid; place-items: center; color: var(--soft); font-size: 0.78rem; }
ol.found li.right { border-color: var(--right); }
.score { font-variant-numeric: tabular-nums; color: var(--soft); }
.strip { display: grid; gap: 4px; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); margin: 12px 0; }
.strip figure { margin: 0; padding: 3px; border: 3px solid transparent; border-radius: 7px; min-width: 0; }
.strip figure.chosen { border-color: var(--key); }
.strip img { width: 100%; height: auto; }
.strip figcaption { font-size: 0.72rem; line-height: 1.35; white-space: nowrap; }
.chart { display: grid; grid-template-columns: 2.2rem 1fr; grid-template-rows: 150px 1.8rem; margin: 10px 0 4px; }
.chart svg { display: block; width: 100%; height: 150px; overflow: visible; }
.chart .y, .chart .x { position: relative; color: var(--soft); font-size: 0.78rem; }
.chart .y span { position: absolute; right: 8px; transform: translateY(-50%); }
.chart .x { grid-column: 2; }
.chart .x span { position: absolute; top: 5px; transform: translateX(-50%); white-space: nowrap; }
.chart .x span.last { transform: translateX(-100%); }
.chart path { fill: none; vector-effect: non-scaling-stroke; }
.chart .grid { stroke: var(--rule); }
.chart path.area { fill: var(--truth); opacity: 0.18; }
.chart .truth { stroke: var(--truth); stroke-width: 2; }
.chart .line { stroke: var(--line); stroke-width: 2; stroke-linejoin: round; }
.chart .dots { stroke: var(--line); stroke-width: 6; stroke-linecap: round; }
.chart .stems { stroke: var(--key); stroke-width: 1; }
.chart .keys { stroke: var(--key); stroke-width: 11; stroke-linecap: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 0.85rem; color: var(--soft); }
.legend i { display: inline-block; width: 18px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: currentColor; }
.legend .line { color: var(--line); } .legend .truth { color: var(--truth); } .legend .keys { color: var(--key); }
.legend i.keys, .legend i.dot { width: 10px; height: 10px; border-radius: 5px; }
.maps { display: flex; flex-wrap: wrap; gap: 8px 32px; }
.maps figure { margin: 0; max-width: 100%; min-width: 0; }
.map { display: block; font-size: 11px; fill: var(--ink); }
.map .cell { fill: var(--heat); }
.map .edge { fill: none; stroke: var(--rule); }
.map .deep { fill: var(--on-heat); }
.map .faint { fill: var(--soft); }
.map image { image-rendering: pixelated; }
.scale { display: inline-block; width: 120px; height: 10px; margin: 0 6px; border: 1px solid var(--rule);
  background: linear-gradient(to right, transparent, var(--heat)); vertical-align: middle; }
details { margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 0.8rem/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; overflow-wrap: normal; }
"""
