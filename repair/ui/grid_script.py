"""What the browser does with the heat maps: their frame, their look and their behaviour.

The script makes the cells from the component's `value`, a JSON text, with `textContent` and
`setAttribute`, which parse nothing. (Gradio evaluates a template after its values are put in, so
no value is in the template.) `selected` comes apart from `value`: a choice among many hundred
cells must not make them anew. A choice shows at once here and is told to Python as `choose`.
"""

HTML = """<div class="maps"></div><p class="details" aria-live="polite"></p>"""

CSS = """
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr));
  gap: 28px; }
section { min-width: 0; }
h3 { margin: 0 0 4px; font-size: 15px; font-weight: 600; color: var(--body-text-color); }
p { margin: 0 0 10px; font-size: 13px; line-height: 1.45;
  color: var(--body-text-color-subdued); min-height: 2.9em; }
.scroll { max-height: 440px; overflow: auto; contain: content; }
table, table th, table tr, table td { border: 0 !important; }
table { border-collapse: separate; border-spacing: 3px; width: 100%; table-layout: fixed;
  min-width: 290px; font-variant-numeric: tabular-nums; }
th { font-size: 11px; font-weight: 500; color: var(--body-text-color-subdued); padding: 2px;
  text-align: center; background: var(--background-fill-primary); position: sticky;
  border-radius: 3px; }
th[tabindex] { cursor: pointer; }
th[tabindex]:hover { color: var(--body-text-color); text-decoration: underline; }
thead th { top: 0; z-index: 1; line-height: 1.15; }
tbody th { left: 0; }
th:first-child { width: 38px; }
td { height: 30px; padding: 0; text-align: center; font-size: 12px; cursor: pointer;
  border-radius: 3px; border: 0; background: var(--light); color: var(--light-ink);
  user-select: none; scroll-margin: 36px 8px 8px 48px; }
td.absent { color: var(--body-text-color-subdued); background:
  repeating-linear-gradient(45deg, transparent 0 4px, var(--border-color-primary) 4px 5px); }
td[aria-selected="true"] { box-shadow: inset 0 0 0 1.5px var(--background-fill-primary),
  0 0 0 3px var(--body-text-color); font-weight: 700; }
td:hover { filter: brightness(1.08); }
td:focus, th:focus { outline: 2px dashed var(--color-accent); outline-offset: 3px; }
th:focus { outline-offset: -2px; }
.strip { display: flex; gap: 1px; height: 22px; margin: 0 0 8px 41px; }
.strip i { flex: 1; min-width: 0; background: var(--light); cursor: pointer;
  border-bottom: 4px solid transparent; background-clip: padding-box; }
.strip i.absent { background: var(--border-color-primary); background-clip: padding-box; }
.strip i.chosen { border-bottom-color: var(--body-text-color); }
.strip i:hover { filter: brightness(1.15); }
.legend { display: flex; align-items: center; gap: 8px; font-size: 12px; margin-top: 8px;
  color: var(--body-text-color-subdued); }
.legend i { flex: 1; height: 8px; border-radius: 4px; background: var(--light); }
.details { margin: 14px 0 0; padding: 10px 12px; min-height: 3.4em; border-radius: 6px;
  color: var(--body-text-color); background: var(--background-fill-secondary); }
"""

# The component's own rules are scoped to it and cannot see the page's theme.
PAGE_CSS = """
.dark #grid td:not(.absent) { background: var(--dark); color: var(--dark-ink); }
.dark #grid .legend i { background: var(--dark); }
.dark #grid .strip i:not(.absent) { background: var(--dark); background-clip: padding-box; }
@media (max-width: 640px) { #grid td { font-size: 10.5px; } #grid table { border-spacing: 2px; }
  #grid th { font-size: 10px; } }
"""

SCRIPT = """
const maps = element.querySelector('.maps');
const details = element.querySelector('.details');
let byPath = {};
let last = null;
let chosenAtFirst = [];

function make(tag, attributes, text) {
  const made = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  if (text !== undefined) { made.textContent = text; }
  return made;
}
function makeCell(cell) {
  if (!cell.path) { return make('td', {role: 'gridcell', class: cell.kind}, cell.text); }
  const made = make('td', {role: 'gridcell', tabindex: -1, class: cell.kind,
    'data-path': cell.path, 'aria-selected': 'false',
    'aria-label': `${cell.text}: ${cell.label}`}, cell.text);
  made.words = cell.label;
  ['light', 'light_ink', 'dark', 'dark_ink'].forEach((name) => {
    if (cell[name]) { made.style.setProperty('--' + name.replace('_', '-'), cell[name]); }
  });
  (byPath[cell.path] = byPath[cell.path] || []).push(made);
  return made;
}
// Whoever uses the keys has PageDown and End in the grid: this is for the eye and the mouse.
function makeStrip(panel) {
  const strip = make('div', {class: 'strip', 'aria-hidden': 'true'});
  panel.rows.forEach((row, at) => {
    const one = make('i', {title: row.strip ? row.strip.words : 'Layer ' + row.layer,
      'data-jump': at, class: row.strip ? '' : 'absent'});
    if (row.strip) {
      one.style.setProperty('--light', row.strip.light);
      one.style.setProperty('--dark', row.strip.dark);
    }
    strip.append(one);
  });
  return strip;
}
function jump(at) {
  maps.querySelectorAll('.scroll').forEach((scroll) => {
    const row = scroll.querySelector('tbody').rows[at];
    scroll.scrollTop = row.offsetTop - (scroll.clientHeight - row.offsetHeight) / 2;
  });
}
function markStrips() {
  maps.querySelectorAll('.strip').forEach((strip) => {
    const rows = strip.parentElement.querySelector('tbody').rows;
    [...strip.children].forEach((one, at) => one.classList.toggle('chosen',
      rows[at].querySelector('[aria-selected="true"]') !== null));
  });
}
function makePanel(panel) {
  const table = make('table', {role: 'grid', 'aria-multiselectable': 'true',
    'aria-label': panel.title, 'data-panel': panel.name});
  const names = make('tr', {role: 'row'});
  names.append(make('th', {role: 'columnheader', scope: 'col'}, 'layer'));
  panel.columns.forEach((name) => names.append(make('th', {role: 'columnheader', scope: 'col',
    tabindex: -1, 'data-line': 'column', title: 'Select or clear the column'}, name)));
  const head = make('thead', {role: 'rowgroup'});
  head.append(names);
  const body = make('tbody', {role: 'rowgroup'});
  panel.rows.forEach((row) => {
    const line = make('tr', {role: 'row'});
    line.append(make('th', {role: 'rowheader', scope: 'row', tabindex: -1, 'data-line': 'row',
      title: 'Select or clear the layer'}, row.layer), ...row.cells.map(makeCell));
    body.append(line);
  });
  table.append(head, body);
  const scroll = make('div', {class: 'scroll'});
  scroll.append(table);
  const strip = panel.has_strip ? [makeStrip(panel)] : [];
  const bar = make('i', {});
  bar.style.setProperty('--light', panel.bar_light);
  bar.style.setProperty('--dark', panel.bar_dark);
  const legend = make('div', {class: 'legend'});
  legend.append(make('span', {}, panel.low), bar, make('span', {}, panel.high));
  const section = make('section', {});
  section.append(make('h3', {}, panel.title), make('p', {}, panel.hint), ...strip, scroll, legend);
  return section;
}
function draw() {
  const hadFocus = maps.contains(document.activeElement);
  const value = JSON.parse(props.value);
  byPath = {};
  chosenAtFirst = value.selected || [];
  maps.replaceChildren(...value.panels.map(makePanel));
  details.textContent = value.details;
  maps.querySelectorAll('table').forEach((table) => {
    const first = table.querySelector('td[data-path]');
    if (first) { first.tabIndex = 0; }
  });
  show();
  const cell = last && (byPath[last[1]] || []).find((c) => panelOf(c) === last[0]);
  if (cell) { hadFocus ? enter(cell) : park(cell); }
}
function show() {
  const sent = props.selected && props.selected.sent ? props.selected.paths : chosenAtFirst;
  const chosen = new Set(sent);
  Object.entries(byPath).forEach(([path, cells]) => mark(cells, chosen.has(path)));
  markStrips();
}
function mark(cells, on) {
  cells.filter((cell) => isOn(cell) !== on).forEach(
    (cell) => cell.setAttribute('aria-selected', String(on)));
}
const isOn = (cell) => cell.getAttribute('aria-selected') === 'true';
const panelOf = (place) => place.closest('table').dataset.panel;
const placeOf = (target) => target.closest ? target.closest('[data-path], [data-line]') : null;
function explain(place) {
  if (place && place.dataset.path) { details.textContent = place.words; }
}
function park(place) {
  const table = place.closest('table');
  table.querySelectorAll('[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
  place.tabIndex = 0;
}
function enter(place) {
  park(place);
  place.focus();
}
function lineOf(head) {
  const at = [...head.parentElement.cells].indexOf(head);
  const rows = [...head.closest('table').tBodies[0].rows];
  const cells = head.dataset.line === 'column' ? rows.map((row) => row.cells[at])
    : [...head.parentElement.cells];
  return cells.filter((cell) => cell && cell.dataset.path);
}
function toggle(place) {
  const cells = place.dataset.path ? [place] : lineOf(place);
  const on = !cells.every(isOn);
  cells.forEach((cell) => mark(byPath[cell.dataset.path], on));
  markStrips();
  trigger('choose', {paths: Object.keys(byPath).filter((path) => isOn(byPath[path][0]))});
}
element.addEventListener('click', (event) => {
  const place = placeOf(event.target);
  if (place) { enter(place); toggle(place); }
  if (event.target.dataset.jump) { jump(Number(event.target.dataset.jump)); }
});
element.addEventListener('mouseover', (event) => explain(placeOf(event.target)));
element.addEventListener('focusin', (event) => {
  const place = placeOf(event.target);
  explain(place);
  if (place && place.dataset.path) { last = [panelOf(place), place.dataset.path]; }
});
element.addEventListener('keydown', (event) => {
  const place = placeOf(event.target);
  if (!place) { return; }
  if (event.key === ' ' || event.key === 'Enter') {
    event.preventDefault();
    toggle(place);
    return;
  }
  const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    PageUp: [-10, 0], PageDown: [10, 0],
    Home: [event.ctrlKey ? -9999 : 0, -9999], End: [event.ctrlKey ? 9999 : 0, 9999]}[event.key];
  if (!step) { return; }
  event.preventDefault();
  const rows = [...place.closest('table').rows];
  const clamp = (n, low, top) => Math.max(low, Math.min(top, n));
  const at = [rows.indexOf(place.parentElement), [...place.parentElement.cells].indexOf(place)];
  // One step reaches the names of layers and modules; a long way ends at the cells.
  const low = step.map((n) => Math.abs(n) > 1 ? 1 : 0);
  const row = rows[clamp(at[0] + step[0], low[0], rows.length - 1)];
  const next = row.cells[clamp(at[1] + step[1], low[1], row.cells.length - 1)];
  if (next && next.hasAttribute('tabindex')) { enter(next); }
});
watch('value', draw);
watch('selected', show);
draw();
"""
