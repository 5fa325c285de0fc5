'use strict';
// The page of jaxsd.studio. It asks /studio/... of its own server and nothing else.

const $ = id => document.getElementById(id);
const TABS = ['text', 'lab', 'read', 'image', 'inpaint', 'control', 'models'];
const TIPS = {read: 'text', models: 'text'}; // tabs that draw as another one does
const given = {}; // {image, inpaint, control}: data: URLs of pictures that were chosen
const items = []; // all pictures that are there: {settings, url, job, number, body, tab, node}
let known = null; // the server's /studio/state
let tab = 'text', running = null, lastSeed = null, opened = null;

function make(tag, fields = {}, ...children) {
  const {data, ...rest} = fields, node = Object.assign(document.createElement(tag), rest);
  Object.assign(node.dataset, data);
  node.append(...children);
  return node;
}

async function ask(path, body) {
  const answer = await fetch(path, body === undefined ? {} : {
    method: 'POST', headers: {'content-type': 'application/json'}, body: JSON.stringify(body)});
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.detail || `the server answered ${answer.status}`);
  return found;
}

// What goes wrong is said in one place.
function attempt(work) {
  return async event => {
    $('wrong').textContent = '';
    try {
      return await work(event);
    } catch (error) {
      $('wrong').textContent = error.message;
    }
  };
}

function options(select, names, value) {
  select.replaceChildren(...names.map(name => {
    const [key, label] = Array.isArray(name) ? name : [name, name];
    return make('option', {value: key, textContent: label});
  }));
  if (value !== undefined && value !== null) select.value = value;
}

// What is going on, as it is seen; for screen readers only what is new.
function tell(text, announced = true) {
  $('said').textContent = text;
  if (announced) $('announced').textContent = text;
}

function size(pair) {
  return `${pair[0]} × ${pair[1]}`;
}

// The model comes after the page.

let ready;
const modelReady = new Promise(resolve => { ready = resolve; });

async function start() {
  const began = performance.now();
  known = await ask('/studio/state');
  options($('sampler'), known.samplers, known.defaults.sampler);
  options($('schedule'), known.schedules, known.defaults.schedule);
  options($('x-field'), known.axes, 'steps');
  options($('y-field'), known.axes, 'sampler');
  options($('resize'), known.resize);
  options($('fill'), ['', ...known.fills].map(name => [name, name || 'as suits']));
  options($('mask_mode'), [['blend', 'mixes old and new'], ['strength', 'is the strength']]);
  options($('kind'), known.preprocessors);
  options($('size'), [['', 'the model’s own']]);
  options($('hires-upscaler'), known.upscalers);
  const rest = fillHires(known.defaults.hires);
  if (rest) $('more').value = JSON.stringify({hires: rest});
  suit({});
  $('steps').max = $('hires-steps').max = $('reference').max = known.limits.steps;
  $('count').max = known.limits.batch;
  while (!known.ready) {
    const seconds = Math.round((performance.now() - began) / 1000);
    if (known.error) {
      $('model').textContent = `The model could not be loaded: ${known.error}`;
      return;
    }
    $('model').textContent = 'The model is being loaded, its programs compiled or fetched '
      + `(${seconds} s); what you ask for now is drawn then.`;
    await new Promise(resolve => setTimeout(resolve, 250));
    const before = known.defaults;
    known = await ask('/studio/state').catch(() => ({...known, error: 'the server has ended'}));
    suit(before);
  }
  model();
  ready();
}

// What suits the model, where the page still says what suited before.
function suit(before) {
  for (const name of ['sampler', 'schedule', 'steps', 'guidance']) {
    const now = known.defaults[name];
    if (name in before && $(name).value !== String(before[name])) continue;
    $(name).value = typeof now === 'object' ? '' : now;
  }
}

// Of a ControlNet-Union, which reads many kinds of hints.
function showModes() {
  const modes = known.modes[$('net').value];
  options($('mode'), modes || []);
  $('of-union').hidden = !modes;
}
$('net').onchange = showModes;

function model() {
  const version = known.version === 'custom' ? '' : `${known.version}, `;
  $('model').textContent = `${known.model} (${version}${known.dtype}) is ready.`;
  const own = [known.native, known.native];
  options($('size'), [...known.sizes.map(pair => [pair.join('x'), size(pair)]),
    ['own', 'another …']], own.join('x'));
  if (known.defaults.width && known.defaults.height) {
    pickSize(known.defaults.width, known.defaults.height);
  }
  for (const name of ['width', 'height']) {
    $(name).step = $(name).min = known.factor;
    $(name).value ||= known.defaults[name] || known.native;
  }
  options($('net'), known.nets);
  options($('kind'), known.preprocessors, $('kind').value);
  showModes();
  options($('hires-upscaler'), [...known.upscalers, ...known.networks.map(name => [name, name])],
    $('hires-upscaler').value);
  $('no-nets').hidden = known.nets.length > 0;
  const others = known.models.filter(one => !one.loaded);
  options($('checkpoint'), others.map(one => [one.name, one.hash ? `${one.name} [${one.hash}]`
    : one.name]));
  $('switching').hidden = !others.length;
  const hash = known.models.find(one => one.loaded)?.hash;
  const facts = {
    'Model': known.model, ...(hash && {'Hash of the file': hash}), 'Version': known.version,
    'Precision': known.dtype,
    'Native size': size(own), 'Hash of the weights': known.weights, 'VAE': known.vae || 'its own',
    'Refiner': known.refiner || 'none', 'LoRAs': known.adapters.join(', ') || 'none',
    'Embeddings': known.embeddings.join(', ') || 'none',
    'ControlNets': known.nets.join(', ') || 'none',
    'Upscalers': known.networks.join(', ') || 'none'};
  $('models').replaceChildren(...terms(facts));
}

function terms(facts) {
  return Object.entries(facts).flatMap(([name, value]) => [
    make('dt', {textContent: name}), make('dd', {textContent: value})]);
}

$('switch').onclick = attempt(async () => {
  const name = $('checkpoint').value;
  $('model').textContent = `${name} is being loaded; what was asked for comes first.`;
  $('switch').disabled = true;
  try {
    const before = known.defaults;
    known = await ask('/studio/switch', {name});
    suit(before);
  } finally {
    $('switch').disabled = false;
    model();
  }
});

// Tabs: arrows move between them, as ARIA's pattern has it.

function show(name, focus = false) {
  tab = name;
  for (const each of TABS) {
    const on = each === name, button = $(`tab-${each}`);
    button.ariaSelected = String(on);
    button.tabIndex = on ? 0 : -1;
    $(`panel-${each}`).hidden = !on;
  }
  $('draw').textContent = name === 'lab' ? 'Draw the grid' : 'Draw';
  offerHires();
  $(`tab-${name}`).scrollIntoView({block: 'nearest', inline: 'nearest'});
  if (focus) $(`tab-${name}`).focus();
}

for (const name of TABS) $(`tab-${name}`).onclick = () => show(name);
document.querySelector('[role=tablist]').onkeydown = event => {
  const at = TABS.indexOf(tab), last = TABS.length - 1;
  const to = {ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at === 0 ? last : at - 1, Home: 0,
    End: last}[event.key];
  if (to !== undefined) {
    event.preventDefault();
    show(TABS[to], true);
  }
};

// The form -> the settings that are sent, and back.

function number(id) {
  if ($(id).value === '' || !$(id).checkValidity()) {
    $(id).focus();
    const name = $(id).labels[0].innerText.trim();
    throw new Error(`${name}: ${$(id).validationMessage || 'expected a number'}`);
  }
  return Number($(id).value);
}

function further() {
  const text = $('more').value.trim();
  if (!text) return {};
  try {
    const found = JSON.parse(text);
    if (found && typeof found === 'object' && !Array.isArray(found)) return found;
  } catch (error) { /* said below */ }
  throw new Error('Further fields: expected JSON such as {"clip_skip": 2}');
}

function settings(kind) {
  const found = {
    prompt: $('prompt').value, negative_prompt: $('negative_prompt').value,
    sampler: $('sampler').value, schedule: $('schedule').value, steps: number('steps'),
    guidance: number('guidance'), seed: $('seed').value.trim() || '-1'};
  const [width, height] = $('size').value === 'own' ? [number('width'), number('height')]
    : $('size').value.split('x').map(Number);
  if (width) Object.assign(found, {width, height});
  if (kind === 'image') {
    Object.assign(found, {image: picture('image'), strength: number('strength'),
      resize: $('resize').value});
  } else if (kind === 'inpaint') {
    const added = SIDES.map(side => number(`out-${side}`));
    Object.assign(found, {image: picture('inpaint'), strength: number('inpaint-strength'),
      mask_blur: number('mask_blur')});
    if ($('fill').value) found.fill = $('fill').value;
    if (added.some(Boolean)) {
      found.outpaint = added;
    } else {
      if (!masked()) throw new Error('Mask: paint what shall be made anew, or give pixels to add');
      Object.assign(found, {mask: mask.toDataURL(), mask_mode: $('mask_mode').value});
    }
  } else if (kind === 'control') {
    if (!$('hint').src) throw new Error('ControlNet: press "Show the hint" first');
    found.controls = [{net: $('net').value, image: $('hint').src, scale: number('scale'),
      start: number('start'), end: number('end'), guess: $('guess').value || null,
      mode: $('mode').value || null}];
  }
  const more = further();
  found.hires = null; // nor the recipe's
  if ($('hires').checked && kind !== 'inpaint') {
    found.hires = {scale: number('hires-scale'), upscaler: $('hires-upscaler').value,
      strength: number('hires-strength'), ...more.hires};
    if ($('hires-steps').value) found.hires.steps = number('hires-steps');
    delete more.hires;
  }
  return {...found, ...more};
}

// What is painted on has one pass.
function offerHires() {
  $('second').hidden = asks() === 'inpaint';
  $('hires-fields').hidden = !$('hires').checked;
}

// Fills the fields -> those that the form has not, or undefined.
function fillHires(given) {
  const {scale, upscaler, strength, steps, ...rest} = {...known?.hires, ...given};
  $('hires').checked = Boolean(given);
  for (const [name, value] of Object.entries({scale, upscaler, strength, steps})) {
    $(`hires-${name}`).value = value ?? '';
  }
  if (!$('hires-upscaler').value) { // a network's: not in the list
    rest.upscaler = upscaler;
    $('hires-upscaler').value = known.hires.upscaler;
  }
  offerHires();
  return Object.keys(rest).length ? rest : undefined;
}

$('hires').onchange = $('lab-from').onchange = offerHires;

function picture(kind) {
  if (!given[kind]) throw new Error('Choose a picture first');
  return given[kind];
}

function pickSize(width, height) {
  const text = `${width}x${height}`;
  const listed = [...$('size').options].some(option => option.value === text);
  $('size').value = listed ? text : 'own';
  $('own-size').hidden = listed;
  if (!listed) [$('width').value, $('height').value] = [width, height];
}

function fill(found) {
  const rest = {...found}, plain = ['prompt', 'negative_prompt', 'seed', 'steps', 'guidance',
    'sampler', 'schedule'];
  for (const name of plain) {
    const value = found[name], choice = $(name).options;
    const fits = value === null || value === undefined || typeof value === 'object' ? false
      : !choice || [...choice].some(option => option.value === value);
    if (fits) $(name).value = value;
    if (fits || value === null) delete rest[name];
  }
  rest.hires = fillHires(found.hires);
  if (!rest.hires) delete rest.hires;
  if (found.width && found.height && !found.outpaint) pickSize(found.width, found.height);
  if (found.strength !== null && found.strength !== undefined) $('strength').value = found.strength;
  for (const name of ['width', 'height', 'strength', 'outpaint', 'mask_blur', 'mask_mode', 'fill',
    'resize']) delete rest[name];
  $('more').value = Object.keys(rest).length ? JSON.stringify(rest, null, 1) : '';
  if ($('more').value) $('more').closest('details').open = true;
}

$('size').onchange = () => { $('own-size').hidden = $('size').value !== 'own'; };
$('dice').onclick = () => { $('seed').value = '-1'; };
$('recycle').onclick = () => { $('seed').value = lastSeed; };

// Drawing.

function axes() {
  return ['x', 'y'].map(side => ({field: $(`${side}-field`).value,
    values: $(`${side}-values`).value})).filter(axis => axis.values.trim());
}

// Beside the text: as which tab this one draws.
function asks() {
  return tab === 'lab' ? $('lab-from').value : TIPS[tab] || tab;
}

function asked() {
  const kind = asks();
  const body = {settings: settings(kind), count: number('count')};
  if (tab === 'lab') {
    body.axes = axes();
    body.reference = number('reference');
    if (!body.axes.length) throw new Error('Laboratory: give values for columns or rows');
  }
  return [body, kind];
}

async function draw() {
  if (running) return;
  const [body, kind] = asked();
  running = {};
  $('draw').disabled = true;
  try {
    if (!known || !known.ready) tell('Waits for the model.');
    await modelReady;
    const began = performance.now();
    const found = await ask('/studio/draw', body);
    running = {job: found.job};
    $('cancel').disabled = $('progress').hidden = false;
    await follow(found, body, kind, began);
  } finally {
    running = null;
    $('draw').disabled = false;
    $('cancel').disabled = $('progress').hidden = true;
  }
}

async function follow(found, body, kind, began) {
  const views = found.settings.map((each, i) => view(each, {
    job: found.job, number: i, body, kind, grid: found.axes.length > 0}));
  const node = card(found, views);
  $('jobs').prepend(node);
  $('tools').hidden = false;
  $('empty').hidden = true;
  if (matchMedia('(max-width: 800px)').matches) node.scrollIntoView({block: 'start'});
  const shown = views.map(() => [0, 0]); // model calls that a preview shows, and when it was got
  let state, before, compiled = 0, first = null;
  for (;;) {
    state = await ask(`/studio/jobs/${found.job}`);
    const now = performance.now();
    if (state.state === 'compiling') compiled = now - began;
    if (state.state === 'running' && !first) first = [now, state.done];
    tell(say(state, now, began, first), state.state !== before);
    before = state.state;
    $('progress').max = state.total;
    $('progress').value = state.done;
    if (state.state === 'done' || state.state === 'cancelled') break;
    const due = views.map((_, i) => i).filter(
      i => state.pictures[i] > shown[i][0] && now - shown[i][1] > 400).slice(0, 4);
    await Promise.all(due.map(async i => {
      shown[i] = [state.pictures[i], now];
      await views[i].load();
    }));
    await new Promise(resolve => setTimeout(resolve, 120));
  }
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  const still = compiled > 500 ? `, ${(compiled / 1000).toFixed(1)} s of it compiling` : '';
  if (state.state === 'cancelled') {
    for (const each of views) each.stopped('cancelled');
    tell(`Cancelled after ${seconds} s, at ${state.done} of ${state.total} model calls.`);
    return;
  }
  await Promise.all(views.map(async (each, i) => {
    if (state.errors[i]) each.stopped(state.errors[i]);
    else await each.load(true);
    if (body.reference) each.far(state.distances[i]);
  }));
  items.push(...views.map(each => each.item).filter(item => item.url));
  const bad = state.errors.filter(Boolean).length;
  lastSeed = found.settings[0].seed;
  $('recycle').disabled = false;
  tell(`${views.length - bad} picture(s) in ${seconds} s${still}.`);
  if (bad) $('wrong').textContent = state.errors.find(Boolean);
}

function say(state, now, began, first) {
  const seconds = Math.round((now - began) / 1000);
  if (state.state === 'waiting') return `Waits for its turn (${seconds} s).`;
  if (state.state === 'compiling') {
    return `Compiles the programs for this size and kind, once (${seconds} s).`;
  }
  const calls = state.done - first?.[1];
  const each = calls > 0 ? (now - first[0]) / calls / 1000 : 0;
  const left = Math.ceil((state.total - state.done) * each);
  return `${state.done} of ${state.total} model calls${left ? `, about ${left} s left` : ''}.`;
}

// A picture on its way, or done: a figure whose button opens it.

function view(found, source) {
  const title = `${found.prompt || 'no prompt'}, ${found.sampler}, ${found.steps} steps, `
    + `seed ${found.seed}`;
  const image = make('img', {alt: `${title}: not there yet`, hidden: true});
  const blank = make('span', {className: 'blank'});
  const button = make('button', {type: 'button', disabled: true}, blank, image);
  const tick = make('input', {type: 'checkbox'});
  const node = make('figure', {}, button, make('figcaption', {}, make('label', {className: 'tick'},
    tick, make('span', {textContent: source.grid ? 'compare' : `seed ${found.seed}`}))));
  tick.disabled = true;
  const item = {...source, settings: found, tick, node, url: null};
  button.onclick = () => detail(item);
  tick.ariaLabel = `Compare: ${found.prompt}, seed ${found.seed}`;
  tick.onchange = () => {
    const count = items.filter(each => each.tick.checked).length;
    $('compare').disabled = count < 2;
    $('compare').textContent = count > 1 ? `Compare ${count}` : 'Compare';
  };
  return {node, item, async load(whole = false) {
    const answer = await fetch(`/studio/jobs/${source.job}/${source.number}.png`);
    if (answer.status !== 200) return;
    const blob = await answer.blob(), url = URL.createObjectURL(blob);
    if (image.src) URL.revokeObjectURL(image.src);
    image.src = url;
    image.hidden = false;
    blank.hidden = true;
    image.classList.toggle('small', found.width <= 192 || !whole);
    if (whole) {
      Object.assign(item, {url, blob});
      image.alt = title;
      button.disabled = tick.disabled = false;
    }
  }, far(distance) {
    node.querySelector('figcaption').append(make('span', {className: 'muted', textContent:
      distance === null ? 'approaches nothing' : `distance ${distance.toFixed(1)}`}));
  }, stopped(why) {
    node.querySelector('figcaption').textContent = why;
  }};
}

function card(found, views) {
  const first = found.settings[0], title = make('h3', {textContent: first.prompt || '(no prompt)'});
  const line = make('p', {className: 'muted', textContent: [first.sampler, first.schedule,
    `${first.steps} steps`, `guidance ${first.guidance}`, size([first.width, first.height])]
    .join(', ')});
  if (!found.axes.length) {
    return make('article', {}, title, line,
      make('div', {className: 'wall'}, ...views.map(each => each.node)));
  }
  const [x, y] = found.axes, table = make('table');
  table.append(make('caption', {className: 'unseen', textContent:
    y ? `${x.field} across, ${y.field} down` : `${x.field} across`}));
  const corner = make('td', {className: 'muted', textContent: `${y?.field} ↓  ${x.field} →`});
  table.append(make('thead', {}, make('tr', {}, ...(y ? [corner] : []), ...x.labels.map(text => make('th', {scope: 'col',
    textContent: text})))));
  const body = make('tbody');
  (y ? y.labels : [null]).forEach((text, row) => body.append(make('tr', {},
    ...(y ? [make('th', {scope: 'row', textContent: text})] : []),
    ...x.labels.map((_, column) => make('td', {}, views[row * x.labels.length + column].node)))));
  table.append(body);
  return make('article', {}, title, make('div', {className: 'scroll'}, table));
}

$('form').onsubmit = event => {
  event.preventDefault();
  attempt(draw)();
};
$('form').noValidate = true; // `number` says what is wrong
document.addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) attempt(draw)();
});
$('cancel').onclick = attempt(() => running?.job && ask(`/studio/jobs/${running.job}/cancel`, {}));
addEventListener('pagehide', () => {
  if (running?.job) {
    fetch(`/studio/jobs/${running.job}/cancel`, {method: 'POST', keepalive: true, body: '{}',
      headers: {'content-type': 'application/json'}});
  }
});

// One picture, and several side by side.

function detail(item) {
  opened = item;
  const at = items.indexOf(item), found = item.settings;
  $('detail-title').textContent = `Picture ${at + 1} of ${items.length}`;
  $('detail-image').src = item.url;
  $('detail-image').alt = item.node.querySelector('img').alt;
  $('detail-image').classList.toggle('small', found.width <= 192);
  $('detail-settings').replaceChildren(...terms(texts(found)));
  $('download').href = item.url;
  $('download').download = `${found.seed}-${
    found.prompt.toLowerCase().replace(/[^a-z0-9]+/g, '-').slice(0, 40) || 'no-prompt'}.png`;
  $('before').disabled = at === 0;
  $('after').disabled = at === items.length - 1;
  if (!$('detail').open) $('detail').showModal();
}

function texts(found) {
  const given = Object.entries(found).filter(([, value]) => value !== null && value !== '');
  return Object.fromEntries(given.map(([name, value]) => [name,
    typeof value === 'object' ? JSON.stringify(value) : String(value)]));
}

function step(by) {
  const next = items[items.indexOf(opened) + by];
  if (next) detail(next);
}

$('before').onclick = () => step(-1);
$('after').onclick = () => step(1);
$('detail').onkeydown = event => {
  if (event.key === 'ArrowLeft') step(-1);
  if (event.key === 'ArrowRight') step(1);
};
for (const button of document.querySelectorAll('.close')) {
  button.onclick = () => button.closest('dialog').close();
}
$('use').onclick = attempt(async () => {
  const {kind, settings: found, body: {settings: sent}} = opened;
  fill(found);
  $('detail').close();
  show(kind, true);
  if (kind === 'image') await take(kind, sent.image);
  if (kind === 'inpaint') {
    await take(kind, sent.image);
    $('inpaint-strength').value = found.strength;
    $('mask_blur').value = found.mask_blur ?? 0;
    $('fill').value = found.fill ?? '';
    SIDES.forEach((side, i) => { $(`out-${side}`).value = found.outpaint?.[i] ?? 0; });
    showSides();
    if (sent.mask) await markAs(sent.mask);
  }
  if (kind === 'control') {
    const [{image, ...fields}] = sent.controls;
    $('net').value = fields.net;
    showModes();
    for (const [name, value] of Object.entries(fields)) $(name).value = value ?? '';
    $('hint').src = image;
    $('hint').hidden = false;
  }
});
$('to-image').onclick = attempt(() => startFrom('image'));
$('to-inpaint').onclick = attempt(() => startFrom('inpaint'));
$('to-trace').onclick = () => {
  const item = opened;
  $('detail').close();
  attempt(() => trace({...item.body.settings, ...item.settings}))();
};

async function startFrom(kind) {
  const {blob} = opened;
  $('detail').close();
  show(kind, true);
  take(kind, await read(blob));
}

$('compare').onclick = () => {
  const chosen = items.filter(each => each.tick.checked);
  const rows = chosen.map(each => texts(each.settings));
  const names = [...new Set(rows.flatMap(Object.keys))];
  const cells = name => rows.map(row => row[name] ?? '');
  $('side-table').replaceChildren(make('tbody', {},
    make('tr', {}, make('th', {scope: 'row', textContent: 'picture'}), ...chosen.map(each => make(
      'td', {}, make('img', {src: each.url, className: each.settings.width <= 192 ? 'small' : '',
        alt: each.node.querySelector('img').alt})))),
    ...names.map(name => make('tr', {}, make('th', {scope: 'row', textContent: name}),
      ...cells(name).map(text => make('td', {textContent: text,
        className: new Set(cells(name)).size > 1 ? 'different' : ''}))))));
  $('side').showModal();
};

// Pictures that are given.

function read(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error('the file cannot be read'));
    reader.readAsDataURL(blob);
  });
}

function chosen(id, use) {
  const input = $(id), drop = input.closest('.drop');
  input.onchange = attempt(async () => input.files[0] && use(await read(input.files[0])));
  drop.ondragover = event => {
    event.preventDefault();
    drop.classList.add('over');
  };
  drop.ondragleave = () => drop.classList.remove('over');
  drop.ondrop = attempt(async event => {
    event.preventDefault();
    drop.classList.remove('over');
    if (event.dataTransfer.files[0]) await use(await read(event.dataTransfer.files[0]));
  });
}

async function take(kind, url) {
  given[kind] = url;
  const image = kind === 'inpaint' ? canvas.image : $(`${kind}-shown`);
  if (image) {
    image.src = url;
    image.hidden = false;
    await image.decode().catch(() => { throw new Error('the browser cannot show this picture'); });
    image.classList.toggle('small', image.naturalWidth <= 192);
  }
  if (kind === 'inpaint') freshMask();
  if (kind === 'control') await preprocess();
}

for (const kind of ['image', 'inpaint', 'control']) chosen(`${kind}-file`, url => take(kind, url));

chosen('read-file', async url => {
  const found = await ask('/studio/read', {image: url});
  fill(found.settings);
  $('read-notes').replaceChildren(
    make('p', {textContent: `The fields are filled${
      found.model ? `; it was made with ${found.model}` : ''}.`}),
    ...(found.notes.length ? [make('ul', {}, ...found.notes.map(
      note => make('li', {textContent: note})))] : []));
});

// The mask: white on black in a canvas of the picture's size; the one that is seen shows both.

const mask = document.createElement('canvas'), canvas = {image: new Image(), x: 0, y: 0, at: null};

function freshMask() {
  const {naturalWidth: width, naturalHeight: height} = canvas.image;
  for (const each of [mask, $('mask')]) [each.width, each.height] = [width, height];
  [canvas.x, canvas.y] = [width >> 1, height >> 1];
  $('brush').max = Math.ceil(Math.max(width, height) / 2);
  $('brush').value = Math.ceil(Math.max(width, height) / 8);
  $('mask').classList.toggle('small', width <= 192);
  clear();
  showSides();
  $('painting').hidden = false;
}

async function markAs(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  pen().drawImage(image, 0, 0);
  paintMask();
}

function pen() {
  return mask.getContext('2d', {willReadFrequently: true});
}

function clear() {
  const context = pen();
  context.fillStyle = '#000';
  context.fillRect(0, 0, mask.width, mask.height);
  paintMask();
}

function stroke(fromX, fromY, toX, toY, erase = $('erase').checked) {
  const context = pen();
  context.strokeStyle = erase ? '#000' : '#fff';
  context.lineWidth = Number($('brush').value);
  context.lineCap = 'round';
  context.beginPath();
  context.moveTo(fromX, fromY);
  context.lineTo(toX, toY + 1e-3); // a point, too
  context.stroke();
  paintMask();
}

function masked() {
  if (!given.inpaint || !mask.width) return 0;
  const {data} = pen().getImageData(0, 0, mask.width, mask.height);
  let sum = 0;
  for (let i = 0; i < data.length; i += 4) sum += data[i];
  return sum / 255 / (data.length / 4);
}

function paintMask(cursor = false) {
  const context = $('mask').getContext('2d'), {width, height} = mask;
  if (!width) return;
  context.clearRect(0, 0, width, height);
  context.drawImage(canvas.image, 0, 0);
  const [left, top, right, bottom] = sides();
  if (left + top + right + bottom) {
    const whole = [width + left + right, height + top + bottom].map(
      side => Math.ceil(side / factor()) * factor());
    $('mask-said').textContent = `${size(whole)}: what is added is painted, the mask does not count`;
    return;
  }
  const over = pen().getImageData(0, 0, width, height);
  const shade = new OffscreenCanvas(width, height), colour = getComputedStyle(document.body)
    .getPropertyValue('--mask').trim().match(/\w\w/g).map(text => parseInt(text, 16));
  for (let i = 0; i < over.data.length; i += 4) {
    over.data[i + 3] = over.data[i] * 0.65;
    over.data.set(colour, i);
  }
  shade.getContext('2d').putImageData(over, 0, 0);
  context.drawImage(shade, 0, 0);
  if (cursor) {
    context.strokeStyle = '#888';
    context.lineWidth = Math.max(1, width / 200);
    context.beginPath();
    context.arc(canvas.x, canvas.y, $('brush').value / 2, 0, 7);
    context.stroke();
  }
  $('mask-said').textContent = `${Math.round(100 * masked())}% is masked`;
}

function place(event) {
  const box = $('mask').getBoundingClientRect();
  return [(event.clientX - box.left) * mask.width / box.width,
    (event.clientY - box.top) * mask.height / box.height];
}

$('mask').onpointerdown = event => {
  $('mask').setPointerCapture(event.pointerId);
  canvas.at = place(event);
  stroke(...canvas.at, ...canvas.at);
};
$('mask').onpointermove = event => {
  if (!canvas.at) return;
  const to = place(event);
  stroke(...canvas.at, ...to);
  canvas.at = to;
};
$('mask').onpointerup = $('mask').onpointercancel = () => { canvas.at = null; };
$('mask').onkeydown = event => {
  const by = Math.max(1, mask.width / 32);
  const [x, y] = {ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by]}[
    event.key] || [0, 0];
  if (x || y) {
    canvas.x = Math.min(mask.width, Math.max(0, canvas.x + x));
    canvas.y = Math.min(mask.height, Math.max(0, canvas.y + y));
  } else if (event.key === ' ' || event.key === 'Delete') {
    stroke(canvas.x, canvas.y, canvas.x, canvas.y, event.key === 'Delete' || $('erase').checked);
  } else {
    return;
  }
  event.preventDefault();
  paintMask(true);
};
$('mask').onblur = () => paintMask();
$('mask-clear').onclick = clear;
$('mask-invert').onclick = () => {
  const context = pen();
  context.globalCompositeOperation = 'difference';
  context.fillStyle = '#fff';
  context.fillRect(0, 0, mask.width, mask.height);
  context.globalCompositeOperation = 'source-over';
  paintMask();
};

// Outpainting: the sides of the picture, drawn outwards; the fields for numbers say the same.

const SIDES = ['left', 'top', 'right', 'bottom'];
const ARROWS = ['ArrowLeft', 'ArrowUp', 'ArrowRight', 'ArrowDown']; // outwards, by side

function factor() {
  return known?.factor || 8;
}

function sides() {
  return SIDES.map(side => Math.max(0, Number($(`out-${side}`).value) || 0));
}

// What there is room for at side i, in the server's and the model's limits.
function room(i) {
  const added = sides(), own = i % 2 ? mask.height : mask.width;
  const across = i % 2 ? mask.width + added[0] + added[2] : mask.height + added[1] + added[3];
  const pixels = Math.min(known?.limits.pixels ?? Infinity, 16 * known?.native ** 2 || Infinity);
  const most = Math.floor(pixels / across) - own - added[(i + 2) % 4];
  return Math.max(0, Math.floor(most / factor()) * factor());
}

function showSides() {
  const added = sides(), [left, top, right, bottom] = added;
  const width = mask.width + left + right, height = mask.height + top + bottom;
  if (!mask.width) return;
  $('frame').style.setProperty('--ratio', width / height);
  Object.assign($('mask').style, {left: `${100 * left / width}%`, top: `${100 * top / height}%`,
    width: `${100 * mask.width / width}%`, height: `${100 * mask.height / height}%`});
  SIDES.forEach((side, i) => Object.assign($(`side-${side}`), {ariaValueNow: String(added[i]),
    ariaValueMax: String(room(i)), ariaValueText: `${added[i]} pixels`}));
  paintMask();
}

function moveSide(i, value) {
  const whole = Math.round(value / factor()) * factor();
  $(`out-${SIDES[i]}`).value = Math.max(0, Math.min(room(i), whole));
  showSides();
}

SIDES.forEach((side, i) => {
  const node = $(`side-${side}`), outwards = i < 2 ? -1 : 1;
  const at = event => (i % 2 ? event.clientY : event.clientX) * outwards;
  let from = null; // where the pointer took it; the scale stays while the picture shrinks
  node.onpointerdown = event => {
    node.setPointerCapture(event.pointerId);
    from = {at: at(event), value: sides()[i],
      scale: mask.width / $('mask').getBoundingClientRect().width};
  };
  node.onpointermove = event => {
    if (from) moveSide(i, from.value + (at(event) - from.at) * from.scale);
  };
  node.onpointerup = node.onpointercancel = () => { from = null; };
  node.onkeydown = event => {
    const now = sides()[i], by = factor(), to = {[ARROWS[i]]: now + by,
      [ARROWS[(i + 2) % 4]]: now - by, PageUp: now + 8 * by, PageDown: now - 8 * by, Home: 0,
      End: room(i)}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    moveSide(i, to);
  };
  $(`out-${side}`).oninput = $(`out-${side}`).onchange = showSides;
});

// ControlNet.

async function preprocess() {
  const [width, height] = $('size').value === 'own' ? [number('width'), number('height')]
    : $('size').value.split('x').map(Number);
  const words = $('kind-options').value.split(',').map(part => part.split('=').map(
    word => word.trim())).filter(pair => pair[0]);
  const found = await ask('/studio/hint', {image: picture('control'), kind: $('kind').value,
    width, height, options: Object.fromEntries(
      words.map(([name, value]) => [name, Number(value)]))});
  $('hint').src = `data:image/png;base64,${found.image}`;
  $('hint').hidden = false;
  $('hint').classList.toggle('small', width <= 192);
}

$('preprocess').onclick = attempt(preprocess);
$('kind').onchange = attempt(() => given.control && preprocess());

// Laboratory.

function copyable(title, text) {
  const button = make('button', {type: 'button', textContent: 'Copy'});
  button.onclick = attempt(async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = 'Copied';
  });
  return make('div', {}, make('div', {className: 'row'}, make('h3', {textContent: title}), button),
    make('pre', {textContent: text, tabIndex: 0}));
}

function extra(title, ...nodes) {
  const close = make('button', {type: 'button', textContent: 'Close'});
  const node = make('article', {className: 'extra'}, make('div', {className: 'row'},
    make('h3', {textContent: title}), close), ...nodes);
  close.onclick = () => node.remove();
  $('jobs').prepend(node);
  $('tools').hidden = false;
  $('empty').hidden = true;
  node.scrollIntoView({block: 'nearest'});
  return node;
}

$('export').onclick = attempt(async () => {
  const [body] = asked();
  if (body.settings.seed === '-1') {
    if (lastSeed === null) {
      throw new Error('Seed: give one, so that the pictures can be made again');
    }
    body.settings.seed = lastSeed;
  }
  await modelReady;
  const found = await ask('/studio/export', body);
  const bytes = Uint8Array.from(atob(found.zip), letter => letter.charCodeAt(0));
  const link = make('a', {className: 'button', textContent: 'Download plan.zip',
    download: 'plan.zip', href: URL.createObjectURL(new Blob([bytes], {type: 'application/zip'}))});
  extra('The same pictures without this page', make('p', {}, link),
    copyable('A run, with plan.jsonl of the zip file', found.command),
    copyable('Python', found.python));
});

const SVG = 'http://www.w3.org/2000/svg';
const COLOURS = ['#0a7bbf', '#d9480f', '#2f9e44', '#9c36b5', '#e03131', '#0b7285', '#a98600',
  '#868e96'];

function draw2(tag, fields, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(fields)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function plot(series) {
  const width = 640, height = 300, left = 50, bottom = 34, top = 10, right = 10;
  const levels = series.flatMap(one => one.sigma).filter(value => value > 0);
  const low = Math.log10(Math.min(...levels)), high = Math.log10(Math.max(...levels));
  const most = Math.max(...series.map(one => one.sigma.length));
  const x = i => left + (width - left - right) * (most > 1 ? i / (most - 1) : 0);
  const y = value => top + (height - top - bottom) * (high - Math.log10(value)) / (high - low || 1);
  const svg = draw2('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label':
    `Noise level of each model call: ${series.map(one => one.name).join('; ')}`});
  for (let tick = Math.ceil(low); tick <= Math.floor(high); tick++) {
    const at = y(10 ** tick);
    svg.append(draw2('line', {x1: left, x2: width - right, y1: at, y2: at, stroke: 'currentColor',
      'stroke-opacity': 0.2}), draw2('text', {x: left - 6, y: at + 4, 'text-anchor': 'end'},
      String(10 ** tick)));
  }
  for (const i of [...new Set([0, 1, 2, 3, 4].map(part => Math.round(part * (most - 1) / 4)))]) {
    svg.append(draw2('text', {x: x(i), y: height - bottom + 16, 'text-anchor': 'middle'},
      String(i + 1)));
  }
  svg.append(draw2('text', {x: width / 2, y: height - 2, 'text-anchor': 'middle'}, 'model call'),
    draw2('text', {x: 2, y: top + 8}, 'σ'));
  series.forEach((one, k) => {
    const points = one.sigma.map((value, i) => [i, value]).filter(([, value]) => value > 0)
      .map(([i, value]) => [x(i), y(value)]);
    const colour = COLOURS[k % COLOURS.length];
    svg.append(draw2('polyline', {points: points.map(point => point.join()).join(' '), fill: 'none',
      stroke: colour, 'stroke-width': 2}));
    for (const [cx, cy] of points) svg.append(draw2('circle', {cx, cy, r: 3, fill: colour}));
  });
  return svg;
}

$('levels').onclick = attempt(async () => {
  const base = settings($('lab-from').value);
  const shown = axes().filter(axis => ['sampler', 'schedule', 'steps'].includes(axis.field));
  let wanted = [{}];
  for (const {field, values} of shown) {
    wanted = wanted.flatMap(each => values.split(',').map(text => text.trim()).filter(Boolean).map(
      text => ({...each, [field]: field === 'steps' ? Number(text) : text})));
  }
  await modelReady;
  const series = [];
  for (const each of wanted.slice(0, COLOURS.length)) {
    const found = await ask('/studio/levels', {settings: {...base, ...each}});
    const calls = found.sigma.filter(Boolean).length;
    series.push({...found, name: `${found.sampler}, ${found.schedule}, ${calls} calls`});
  }
  const legend = make('ul', {className: 'legend'}, ...series.map((one, k) => {
    const mark = make('span', {textContent: '● ', ariaHidden: 'true'});
    mark.style.color = COLOURS[k];
    return make('li', {}, mark, one.name);
  }));
  const left = wanted.length - series.length;
  extra('Noise levels of the model calls',
    make('div', {className: 'scroll'}, plot(series)), legend,
    ...(left > 0 ? [make('p', {className: 'muted',
      textContent: `and ${left} more that are not shown`})] : []),
    ...series.filter(one => one.mix.length).map(table));
});

// What a sampler mixes after each call, where any of it is not 0.
function table(one) {
  const columns = one.columns.map((name, i) => [name, i]).filter(
    ([, i]) => one.mix.some(row => row[i]));
  return make('details', {}, make('summary', {textContent: `Coefficients of ${one.name}`}),
    make('div', {className: 'scroll'}, make('table', {},
      make('thead', {}, make('tr', {}, ...['call', 'σ', ...columns.map(([name]) => name)].map(
        text => make('th', {scope: 'col', textContent: text})))),
      make('tbody', {}, ...one.sigma.map((sigma, i) => make('tr', {},
        ...[i + 1, sigma.toPrecision(4), ...columns.map(([, k]) => one.mix[i][k].toFixed(4))].map(
          text => make('td', {textContent: text}))))))));
}

$('trace').onclick = attempt(() => trace(settings($('lab-from').value)));

async function trace(asked) {
  await modelReady;
  tell('Traces: compiles a program of its own, then decodes every step.');
  let found;
  try {
    found = await ask('/studio/trace', {settings: asked});
  } finally {
    tell('');
  }
  const names = {noisy: 'the noisy picture', eps: 'the noise it predicts',
    denoised: 'the picture it predicts'};
  const figures = Object.entries(names).map(([name, text]) => {
    const image = make('img', {className: found.settings.width <= 192 ? 'small' : ''});
    return [name, image, make('figure', {}, image, make('figcaption', {textContent: text}))];
  });
  const slider = make('input', {type: 'range', min: 0, max: found.calls.length - 1,
    value: (found.calls.length - 1) >> 1});
  const said = make('p', {role: 'status'});
  slider.oninput = () => {
    const call = found.calls[slider.value];
    said.textContent = `Model call ${Number(slider.value) + 1} of ${found.calls.length}: `
      + `step ${call.step}, σ = ${call.sigma.toPrecision(3)}, t = ${Math.round(call.timestep)}`;
    for (const [name, image] of figures) {
      image.src = `data:image/png;base64,${call[name]}`;
      image.alt = `${names[name]} at model call ${Number(slider.value) + 1}`;
    }
  };
  slider.oninput();
  extra(`Trace of “${found.settings.prompt}”, seed ${found.settings.seed}`,
    make('div', {className: 'trace'}, ...figures.map(([, , node]) => node)),
    make('label', {textContent: 'Model call'}, slider), said);
}

show('text');
attempt(start)();
