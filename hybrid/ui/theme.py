"""How the face looks: a calm theme from the fonts a machine already has, and the few rules Gradio has none for."""

from __future__ import annotations

from typing import Any

TITLE = "hybrid"

NAME = '<b class="hy-name">hybrid</b>'

CSS = """
.gradio-container { width: 100% !important; max-width: min(1280px, 100vw) !important; min-width: 0 !important;
  margin: 0 auto !important; padding: 0 !important; }
.gradio-container > .main { padding: .6rem 1rem !important; }
.gradio-container .contain { gap: .5rem !important; }
.tabitem { padding: .6rem 0 0 !important; border: 0 !important; }
.hy-line { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; align-items: baseline; padding: .3rem .1rem;
  font-size: .84rem; color: var(--body-text-color-subdued); }
.hy-line > span { white-space: nowrap; }
.hy-name { font-size: 1.3rem; letter-spacing: -.02em; color: var(--body-text-color); }
.hy-state { color: var(--body-text-color); font-weight: 600; white-space: normal !important; }
.hy-dot { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .45rem; }
.hy-ok { background: #10b981; } .hy-wait { background: #f59e0b; } .hy-down { background: #ef4444; }
.hy-wait { animation: hy-breathe 1.6s ease-in-out infinite; }
@keyframes hy-breathe { 50% { opacity: .35; } }
@media (prefers-reduced-motion: reduce) { .hy-wait { animation: none; } }
.hy-bar { display: inline-block; width: 5.5rem; height: .5rem; border-radius: 1rem; overflow: hidden;
  background: var(--border-color-primary); vertical-align: middle; }
.hy-bar i { display: block; height: 100%; background: var(--color-accent); border-radius: 1rem; transition: width .4s; }

.hy-panel { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: .9rem 1rem;
  background: var(--block-background-fill); font-size: .88rem; line-height: 1.45; overflow-wrap: anywhere; }
.hy-panel h4, .hy-house h4 { margin: 0 0 .5rem; font-size: .95rem; font-weight: 600; }
.hy-panel h5 { margin: 1rem 0 .3rem; font-size: .85rem; font-weight: 600; }
.hy-panel p { margin: .5rem 0; }
.hy-empty { color: var(--body-text-color-subdued); }
.hy-bad { color: #dc2626; } .hy-warn { color: #b45309; }
.dark .hy-bad { color: #f87171; } .dark .hy-warn { color: #fbbf24; }
.hy-badge { display: flex; flex-wrap: wrap; gap: .3rem .7rem; align-items: center; font-size: .88rem; }

.hy-pill { display: inline-block; padding: .08rem .55rem; border-radius: 1rem; font-size: .8rem; font-weight: 600;
  background: #e2e8f0; color: #1e293b; }
.hy-adapter { background: #ccfbf1; color: #115e59; } .hy-rag { background: #dbeafe; color: #1e40af; }
.hy-adapter-rag { background: #e0e7ff; color: #3730a3; } .hy-few-shot { background: #fef3c7; color: #92400e; }
.dark .hy-pill { background: #334155; color: #e2e8f0; }
.dark .hy-adapter { background: #134e4a; color: #99f6e4; } .dark .hy-rag { background: #1e3a8a; color: #bfdbfe; }
.dark .hy-adapter-rag { background: #312e81; color: #c7d2fe; }
.dark .hy-few-shot { background: #78350f; color: #fde68a; }

.hy-scores { width: 100%; border-collapse: collapse; margin: .8rem 0; }
.hy-scores caption { text-align: left; font-size: .85rem; font-weight: 600; padding-bottom: .25rem; }
.hy-scores :is(th, td) { padding: .14rem .6rem .14rem 0 !important; text-align: left; font-weight: 400; }
.hy-scores td:nth-child(2) { width: 50%; }
.hy-scores td:last-child { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  padding-right: 0 !important; }
.hy-scores .hy-bar { width: 100%; display: block; } .hy-scores tr:not(.hy-won) i { opacity: .4; }
.hy-facts { display: flex; flex-wrap: wrap; gap: .35rem 1.4rem; margin: .6rem 0 0; }
.hy-facts dt { font-size: .74rem; color: var(--body-text-color-subdued); } .hy-facts dd { margin: 0; }
.hy-folds { list-style: none; margin: 0; padding: 0; }
.hy-folds li { border-top: 1px solid var(--border-color-primary); }
.hy-more { margin-top: .8rem; }
.hy-more > summary { cursor: pointer; font-weight: 600; font-size: .85rem; padding: .3rem 0; }
.hy-more li { padding: .4rem 0; }
.hy-folds summary { cursor: pointer; padding: .4rem 0; }
.hy-folds p { white-space: pre-wrap; margin: .1rem 0 .4rem; }
.hy-folds small { color: var(--body-text-color-subdued); }
.hy-folds em { font-style: normal; font-size: .74rem; color: var(--color-accent); }
.hy-panel summary:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; border-radius: 4px; }

.hy-house { padding: .4rem .1rem; }
.hy-wide { overflow-x: auto; margin-bottom: .6rem; }
.hy-table { width: 100%; border-collapse: collapse; font-size: .88rem; }
.hy-table th { text-align: left; font-weight: 500; font-size: .78rem; color: var(--body-text-color-subdued); }
.hy-table :is(th, td) { padding: .45rem .9rem .45rem 0 !important; border-bottom: 1px solid var(--border-color-primary);
  vertical-align: top; }
.hy-table td small { display: block; min-width: 9rem; }
.hy-table tr[data-pick] { cursor: pointer; }
.hy-table tr[data-pick]:hover td { background: color-mix(in srgb, var(--color-accent) 6%, transparent); }
.hy-table tr.hy-picked td { background: color-mix(in srgb, var(--color-accent) 12%, transparent); }
.hy-pick { font-weight: 600; text-align: left; overflow-wrap: anywhere; }
.hy-pick:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; border-radius: 4px; }
.hy-long { display: block; width: 100%; }
.hy-panel h4 small, .hy-about { color: var(--body-text-color-subdued); font-weight: 400; }
.hy-about { font-size: .84rem; }
.hy-ask { margin: .6rem .2rem; }
.hy-sure { align-items: center; }
#hy-house-tab .html-container { padding: 0 !important; }
#hy-house-tab .hy-table td:first-child { min-width: 8rem; }
#hy-card .prose table { width: 100%; font-size: .84rem; word-break: normal; overflow-wrap: break-word; }
#hy-card .prose :is(table, tr) { border: 0; }
#hy-card .prose :is(th, td) { border: 0; border-bottom: 1px solid var(--border-color-primary);
  padding: .28rem .6rem .28rem 0; vertical-align: top; text-align: left; }
#hy-card .prose th { font-weight: 600; }

.hy-panel a { color: var(--color-accent); text-decoration: underline; }
.hy-sides { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .6rem;
  margin-top: .6rem; }
.hy-side { border-left-width: 4px; } .hy-side header { display: flex; flex-wrap: wrap; gap: .2rem .6rem; }
.hy-side small { color: var(--body-text-color-subdued); }
.hy-text { white-space: pre-wrap; max-height: 16rem; overflow-y: auto; }
.hy-good { border-left-color: #059669; } .hy-poor { border-left-color: #dc2626; }
.hy-part { border-left-color: #d97706; }
.hy-good header b { color: #047857; } .hy-poor header b { color: #b91c1c; } .hy-part header b { color: #b45309; }
.dark .hy-good header b { color: #34d399; } .dark .hy-poor header b { color: #f87171; }
.dark .hy-part header b { color: #fbbf24; }
.hy-board h4 { margin: 1.2rem 0 .2rem; font-weight: 600; }
.hy-board .note { font-size: .84rem; color: var(--body-text-color-subdued); }
#hy-example-list td + td { white-space: nowrap; }
#hy-example-list .hy-wide { max-height: 36rem; overflow-y: auto; }

#hy-library-tab .html-container { padding: 0 !important; }
#hy-library-tab .hy-table td:first-child { overflow-wrap: anywhere; }
#hy-documents .hy-wide { max-height: 30rem; overflow-y: auto; } #hy-documents td:last-child { white-space: nowrap; }
.hy-refused { margin: .3rem 0 .3rem 1.1rem; font-size: .88rem; }
.hy-hits { list-style: none; margin: .4rem 0 0; padding: 0; max-height: 34rem; overflow-y: auto; }
.hy-hits li { display: flex; gap: .7rem; padding: .55rem .4rem; cursor: pointer;
  border-top: 1px solid var(--border-color-primary); }
.hy-hits li:hover { background: color-mix(in srgb, var(--color-accent) 6%, transparent); }
.hy-hits li.hy-picked { background: color-mix(in srgb, var(--color-accent) 12%, transparent); }
.hy-hits p { margin: .15rem 0 .3rem; font-size: .86rem; overflow-wrap: anywhere; color: var(--body-text-color); }
.hy-nth { min-width: 1.2rem; text-align: right; font-variant-numeric: tabular-nums;
  color: var(--body-text-color-subdued); }
.hy-stages { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0; font-size: .8rem; }
.hy-stages dt { font-size: .72rem; color: var(--body-text-color-subdued); }
.hy-stages dd { margin: 0; font-variant-numeric: tabular-nums; }
.hy-stages small { color: var(--body-text-color-subdued); } .hy-off { opacity: .55; }
.hy-document { max-height: 40rem; overflow-y: auto; margin-top: .8rem; }
.hy-document h4 small { font-weight: 400; color: var(--body-text-color-subdued); }
.hy-document section p { white-space: pre-wrap; margin: .3rem 0 .7rem; }
.hy-document mark { background: color-mix(in srgb, #facc15 38%, transparent); color: inherit; border-radius: 3px;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; padding: .05rem .15rem; }
.hy-map { margin: 0; border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--block-background-fill); padding: .6rem .8rem; }
.hy-map svg { display: block; width: 100%; height: auto; }
.hy-map g[data-pick] { cursor: pointer; } .hy-map circle { fill-opacity: .72; }
.hy-map g[data-pick]:hover circle, .hy-map .hy-picked circle { fill-opacity: 1; stroke: var(--body-text-color);
  stroke-width: 1.6; }
.hy-ringed circle { fill-opacity: 1; stroke: var(--body-text-color); stroke-width: 1.2; }
.hy-ringed text { font-size: 11px; font-weight: 600; text-anchor: middle; fill: var(--body-text-color);
  paint-order: stroke; stroke: var(--block-background-fill); stroke-width: 3px; }
.hy-star path { fill: #facc15; stroke: #713f12; stroke-width: 1; } .hy-starred { color: #ca8a04; margin-right: .35rem; }
.hy-says { margin: .4rem 0; font-size: .84rem; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 2.6em; }
.hy-legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 0; padding: 0;
  font-size: .8rem; color: var(--body-text-color-subdued); }
.hy-legend i { display: inline-block; width: .65rem; height: .65rem; border-radius: 50%; margin-right: .35rem; }

#hy-window { height: calc(100vh - 21rem) !important; min-height: 20rem; }
#hy-window .placeholder-content { padding: 1.5rem; }
#hy-window .example { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); }
#hy-window .example:hover, #hy-window .example:focus-visible { border-color: var(--color-accent); }
#hy-box, #hy-box textarea { border-color: transparent; }
#hy-window .message:has(.thought-group) + .message-buttons { display: none; }
#hy-window .message, #hy-window .flex-wrap { min-width: 0; max-width: 100%; }
#hy-window pre, #hy-window code, .hy-answer pre, .hy-answer code { white-space: pre-wrap; overflow-wrap: anywhere; }
.hy-tools { align-items: center; }
@media (max-width: 640px) {
  .gradio-container > .main { padding: .4rem .5rem !important; }
  .hy-line { font-size: .76rem; gap: .15rem .8rem; }
  #hy-window { height: calc(100vh - 22rem) !important; }
  .hy-map circle { r: 4.6px; } .hy-ringed circle { r: 8px; }
}
"""


def theme() -> Any:
    """A theme that fetches no font: the system's own, in slate and teal."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_500",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_border_width="1px",
        button_large_text_weight="500",
        button_medium_text_weight="500",
        color_accent="*primary_600",
    )
