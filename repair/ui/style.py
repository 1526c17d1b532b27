"""How the app looks: a calm theme and a little CSS, in the light and the dark."""

import gradio as gr

from repair.ui.grid_script import PAGE_CSS

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.slate,
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "monospace"],
    radius_size=gr.themes.sizes.radius_md,
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
    button_primary_text_color="white",
    block_label_text_weight="500",
    body_text_color_subdued="*neutral_600",  # hints are read, too: 7.6 to 1 on white
    body_text_color_subdued_dark="*neutral_400",
    button_large_text_size="*text_md",
    button_large_text_weight="500",
    button_large_padding="9px 16px",
    button_secondary_text_color="*body_text_color",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
    button_cancel_background_fill_dark="#b91c1c",
    button_cancel_text_color="white",
)

# The report is too long to be shown whole: it can be entered and scrolled, but not changed.
# (Gradio has no such state, so its box is changed when it appears.)
SCRIPT = """() => {
  const open = () => document.querySelectorAll('#report textarea:disabled').forEach((box) => {
    box.disabled = false;
    box.readOnly = true;
  });
  new MutationObserver(open).observe(document.body, {childList: true, subtree: true});
  open();
}"""

# One rule per percent: the bar is the box's background, so that its text stays text.
_BARS = "".join(f".p{n} textarea{{--done:{n}%}}" for n in range(101))

CSS = (
    """
/* Gradio's accent has one value for both themes, too light to be read on white. */
.gradio-container { --color-accent: #0f766e; --edge: clamp(12px, 2.5vw, 32px);
  max-width: clamp(1180px, 62vw, 1800px) !important; margin: 0 auto !important;
  overflow: clip !important; }
.dark .gradio-container { --color-accent: #2dd4bf; }
#title h1 { font-size: 20px; font-weight: 600; margin: 4px 0 0; }
.lead h2 { font-size: 19px; font-weight: 600; margin: 10px 0 4px; }
.empty { color: var(--body-text-color-subdued); max-width: 68ch; }
.empty p { font-size: 15px; line-height: 1.55; }
#facts { gap: 10px; }
/* What the screen is about stays in sight, where there is room for it. */
@media (min-width: 800px) and (min-height: 600px) {
  #facts { position: sticky; top: 0; z-index: 30; background: var(--body-background-fill); }
}
.fact textarea, .fact input { font-weight: 600; border: 0 !important; box-shadow: none !important;
  background: transparent !important; padding-left: 0 !important; text-overflow: ellipsis; }
.fact { border-left: 4px solid var(--border-color-primary) !important; }
.verdict-good { border-left-color: #15803d !important; }
.verdict-bad { border-left-color: #dc2626 !important; }
.verdict-unsure { border-left-color: #d97706 !important; }
.verdict-neutral { border-left-color: #2563eb !important; }
.verdict-good textarea, .verdict-good input { color: #15803d !important; }
.verdict-bad textarea, .verdict-bad input { color: #b91c1c !important; }
.verdict-unsure textarea, .verdict-unsure input { color: #a15c07 !important; }
.verdict-neutral textarea, .verdict-neutral input { color: #1d4ed8 !important; }
.dark .verdict-good textarea, .dark .verdict-good input { color: #4ade80 !important; }
.dark .verdict-bad textarea, .dark .verdict-bad input { color: #f87171 !important; }
.dark .verdict-unsure textarea, .dark .verdict-unsure input { color: #fbbf24 !important; }
.dark .verdict-neutral textarea, .dark .verdict-neutral input { color: #93c5fd !important; }
.state-running, .state-queued { border-left-color: var(--color-accent) !important; }
.state-failed { border-left-color: #dc2626 !important; }
.state-stopped { border-left-color: #d97706 !important; }
#progress textarea { background-image: linear-gradient(90deg,
  color-mix(in srgb, var(--color-accent) 24%, transparent) var(--done, 0%),
  transparent var(--done, 0%)); transition: background-image .3s; }
.problem { border-left: 4px solid #dc2626 !important; }
.bar, #panel .row { align-items: center !important; }
.bar > button, #panel button#stop { flex-grow: 0 !important; height: auto; margin: 0 10px; }
.table-wrap, .table-wrap td, .table-wrap th, .cell-wrap, .gradio-container table {
  font-family: var(--font) !important; font-variant-numeric: tabular-nums; }
#facts .block { padding: 6px 12px !important; }
.gradio-container textarea, .gradio-container input[type="text"],
.gradio-container [role="gridcell"] { unicode-bidi: plaintext; overflow-wrap: anywhere; }
#report textarea { font-family: var(--font-mono); font-size: 13px; }
footer { display: none !important; }
/* Whoever uses the keys sees where they are, in every kind of field: Gradio's own rules, which
   take the outline away, are outweighed by the repeated name. */
.gradio-container.gradio-container.gradio-container :focus-visible {
  outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
.gradio-container .virtual-table-viewport :focus-visible, .gradio-container div:focus-visible {
  outline-offset: -2px; }
.gradio-container label:has(input:is([type="radio"], [type="checkbox"]):focus-visible) {
  outline: 2px solid var(--color-accent); outline-offset: 2px; }
/* A box that cannot be entered cannot be scrolled by keys: it shows all that it holds. */
.gradio-container textarea:disabled { field-sizing: content; height: auto !important;
  max-height: none !important; overflow: hidden !important; }
/* Lists of hundreds of lines are no exception to be shown whole while a job runs. */
.gradio-container #prompts textarea:disabled, .gradio-container #texts textarea:disabled,
.gradio-container #near textarea:disabled, .gradio-container #ordinary textarea:disabled {
  max-height: 22em !important; overflow: auto !important; }
.gradio-container .column, .gradio-container .tabitem > * { min-width: 0; }
.dark #tokens :is(.text, .textspan, .legend-item) { color: #ffffff !important; }
/* A chart keeps the colours of the theme that it was drawn in; a page may change to the other. */
svg.marks text { fill: var(--body-text-color) !important; }
svg.marks :is(.role-axis-grid, .role-axis-tick) line {
  stroke: var(--border-color-primary) !important; }
/* News must not cover the header, which says the same and stays. */
.toast-wrap { top: auto !important; bottom: 16px !important; }
#mirror [data-testid="checkbox-group"] { max-height: 340px; overflow: auto; padding: 3px; }
/* Wide tables scroll inside their own box; the page never does. */
.gradio-container .app { padding: 16px var(--edge) !important; }
.gradio-container main { max-width: calc(100vw - 2 * var(--edge)); }
#samples, #rates, #gates, #controls, #grown, #files, #model-facts, #cases, #besides, #returns,
#attempts {
  max-width: calc(100vw - 2 * var(--edge)); overflow-x: auto; }
#by-role, #by-head, #tried-answers, #pair-list {
  max-width: calc(100vw - 2 * var(--edge) - 28px); overflow-x: auto; }
@media (max-width: 640px) {
  #facts .form { display: grid !important; grid-template-columns: 1fr 1fr; }
  #facts .form > * { min-width: 0 !important; }
}
"""
    + PAGE_CSS
    + _BARS
)
