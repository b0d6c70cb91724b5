"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const n = data.ids.length, xs = new Float32Array(n), ys = new Float32Array(n);
data.xy.forEach(([x, y], i) => { xs[i] = x; ys[i] = -y; });
const canvas = $("map"), pen = canvas.getContext("2d"), tip = $("tip"), card = $("card");
const fields = data.fields, colourable = fields.filter((field) => field.colour);
const THEME = ["--s1", "--s2", "--s3", "--s4", "--s5", "--s6", "--s7", "--s8"];
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const STEPS = 32;

let width = 1, height = 1, ratio = 1, zoom = 1, panX = 0, panY = 0;
const MARGIN = 26; // pixels beside the canvas that dots may reach into, so that none need be cut
let field = null, shades = [], inks = [], hidden = [], mask = null, image = null, words = null, shade = new Int16Array(n), order = new Int32Array(n), off = new Set();
let hot = -1, pinned = -1, loop = null, lassoing = false, planned = false;
const picked = new Set();

/* ---- what is known of a sample ---- */
const element = (name, text, className) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
};
const told = (column, i) => {
  const value = column.values[i];
  if (value === null) return "";
  return column.kind === "category" ? column.labels[value] : String(Number(value.toPrecision(4)));
};
const summary = (i) => fields.filter((f) => f.role === "class" || f.role === "prediction" || (f.card && !f.colour))
  .map((f) => [f.name, told(f, i)]).filter(([, text]) => text);
const wrong = (i) => fields.some((f) => f.role === "error" && f.kind === "category" && f.values[i] === 1);
const views = (i, named = true) => {
  const box = element("div", undefined, "views");
  for (const [view, uri, text] of data.pictures[i]) {
    const figure = element("figure");
    if (uri) {
      const image = element("img");
      image.src = uri;
      image.alt = `${data.views[view]} view of ${data.ids[i]}`;
      figure.append(image);
    } else figure.append(element("p", text));
    if (named) figure.append(element("figcaption", data.views[view]));
    box.append(figure);
  }
  return box;
};

/* ---- colours ---- */
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const ramp = (t) => {
  const at = Math.min(Math.max(t, 0), 1) * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  return `rgb(${RAMP[low].map((c, k) => Math.round(c + (RAMP[low + 1][k] - c) * (at - low))).join(",")})`;
};
const categoryColour = (column, k) => {
  if (column.role === "error") return css(k ? "--s2" : "--s1");
  if (column.labels.length <= THEME.length) return css(THEME[k]);
  return `hsl(${(k * 137.508) % 360} ${55 + 25 * (k % 2)}% ${(dark() ? 64 : 44) + 8 * (k % 3) - 8}%)`;
};
const bounds = (column) => {
  const known = column.values.filter((value) => value !== null).sort((a, b) => a - b);
  return [known[Math.floor(known.length * 0.01)], known[Math.ceil(known.length * 0.99) - 1]];
};
function paint() {
  const unknown = css("--unknown");
  if (!field) {
    shades = [css("--s1")];
    shade.fill(0);
  } else if (field.kind === "category") {
    shades = [...field.labels.map((_, k) => categoryColour(field, k)), unknown];
    field.values.forEach((value, i) => { shade[i] = value === null ? field.labels.length : value; });
  } else {
    const [low, high] = bounds(field);
    shades = [...Array.from({ length: STEPS }, (_, k) => ramp(k / (STEPS - 1))), unknown];
    field.values.forEach((value, i) => {
      const t = value === null ? 0 : high > low ? (value - low) / (high - low) : 0.5;
      shade[i] = value === null ? STEPS : Math.round(Math.min(Math.max(t, 0), 1) * (STEPS - 1));
    });
  }
  inks = shades.map(word);
  hidden = shades.map((_, k) => off.has(k));
  const count = new Int32Array(shades.length);
  shade.forEach((k) => { count[k] += 1; });
  const last = shades.length - 1;
  const rank = (i) => (field && shade[i] === last ? n + 1 : field && field.kind === "category" ? count[shade[i]] : 0);
  order = Int32Array.from(order.keys()).sort((a, b) => rank(b) - rank(a)); // the rare are drawn last, on top
  legend(count);
  redraw();
}
function legend(count) {
  const box = $("legend");
  box.replaceChildren();
  if (!field) return;
  if (field.kind === "number") {
    const [low, high] = bounds(field), bar = element("div", undefined, "scalebar"), strip = element("i");
    strip.style.background = `linear-gradient(90deg, ${RAMP.map((_, k) => ramp(k / (RAMP.length - 1))).join(",")})`;
    bar.append(element("span", String(Number(low.toPrecision(3)))), strip, element("span", String(Number(high.toPrecision(3)))));
    box.append(bar);
    if (count[STEPS]) {
      const dot = element("span", undefined, "dot"), note = element("span", undefined, "scalebar");
      dot.style.background = shades[STEPS];
      note.append(dot, `unknown ${count[STEPS]}`);
      box.append(note);
    }
    return;
  }
  [...field.labels, "unknown"].forEach((label, k) => {
    if (!count[k]) return;
    const button = element("button"), dot = element("span", undefined, "dot");
    button.type = "button";
    button.title = `Show or hide ${label}`;
    button.setAttribute("aria-pressed", String(!off.has(k)));
    dot.style.background = shades[k];
    button.append(dot, element("span", label), element("em", String(count[k])));
    button.addEventListener("click", () => {
      if (!off.delete(k)) off.add(k);
      button.setAttribute("aria-pressed", String(!off.has(k)));
      hidden[k] = off.has(k);
      redraw();
    });
    box.append(button);
  });
}

/* ---- drawing ---- */
let spanX = 1, spanY = 1;
for (let i = 0; i < n; i += 1) { spanX = i ? Math.max(spanX, Math.abs(xs[i])) : Math.abs(xs[i]); spanY = i ? Math.max(spanY, Math.abs(ys[i])) : Math.abs(ys[i]); }
const scale = () => zoom * Math.min((width / 2 - 24) / (spanX || 1), (height / 2 - 24) / (spanY || 1));
const screenX = (i) => width / 2 + panX + xs[i] * scale();
const screenY = (i) => height / 2 + panY + ys[i] * scale();
const radius = () => Math.min((n > 5000 ? 2.2 : n > 1000 ? 3.2 : 5) * Math.pow(zoom, 0.3), 11);
/* Dots are written into the pixels themselves: 20,000 of them take a few milliseconds, also without a graphics card. */
const drop = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function word(colour) {
  drop.clearRect(0, 0, 1, 1);
  drop.fillStyle = colour;
  drop.fillRect(0, 0, 1, 1);
  const [r, g, b] = drop.getImageData(0, 0, 1, 1).data;
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}
function makeMask(size, across) {
  const reach = Math.ceil(size), core = [], edge = [], soft = [];
  for (let dy = -reach; dy <= reach; dy += 1) {
    for (let dx = -reach; dx <= reach; dx += 1) {
      const covered = size + 0.5 - Math.hypot(dx, dy);
      if (covered >= 1) core.push(dy * across + dx);
      else if (covered > 0) { edge.push(dy * across + dx); soft.push(Math.round(255 * covered)); }
    }
  }
  return { size, across, reach, core: Int32Array.from(core), edge: Int32Array.from(edge), soft };
}
function stamp() {
  const across = image.width - 2 * MARGIN, down = image.height - 2 * MARGIN, size = radius() * ratio;
  if (!mask || mask.size !== size || mask.across !== image.width) mask = makeMask(size, image.width);
  const { core, edge, soft, reach } = mask, s = scale() * ratio, rim = size > 3 ? word(css("--card")) : 0;
  const x0 = (width / 2 + panX) * ratio, y0 = (height / 2 + panY) * ratio;
  words.fill(0);
  for (let k = 0; k < n; k += 1) {
    const i = order[k], x = Math.round(x0 + xs[i] * s), y = Math.round(y0 + ys[i] * s);
    if (x < -reach || y < -reach || x >= across + reach || y >= down + reach || hidden[shade[i]]) continue;
    const at = (y + MARGIN) * image.width + x + MARGIN, colour = inks[shade[i]];
    for (let j = 0; j < core.length; j += 1) words[at + core[j]] = colour;
    for (let j = 0; j < edge.length; j += 1) {
      const p = at + edge[j];
      if (words[p] === 0) words[p] = ((colour & 0xffffff) | (soft[j] << 24)) >>> 0;
      else if (rim) words[p] = rim;
    }
  }
  pen.putImageData(image, -MARGIN, -MARGIN);
}
function ring(i, colour, extra) {
  pen.beginPath();
  pen.arc(screenX(i), screenY(i), radius() + extra, 0, 7);
  pen.strokeStyle = colour;
  pen.lineWidth = 2.5;
  pen.stroke();
}
function draw() {
  planned = false;
  const start = performance.now();
  stamp();
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  for (const i of picked) ring(i, css("--s3"), 1.5);
  if (pinned >= 0) {
    pen.strokeStyle = css("--ink-3");
    pen.lineWidth = 1;
    for (const other of data.near[pinned]) {
      pen.beginPath();
      pen.moveTo(screenX(pinned), screenY(pinned));
      pen.lineTo(screenX(other), screenY(other));
      pen.stroke();
    }
    ring(pinned, css("--ink"), 3);
  }
  if (hot >= 0 && hot !== pinned) ring(hot, css("--accent"), 2.5);
  if (loop && loop.length > 1) {
    pen.beginPath();
    loop.forEach(([x, y], k) => (k ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.closePath();
    pen.strokeStyle = css("--accent");
    pen.lineWidth = 1.5;
    pen.stroke();
    pen.globalAlpha = 0.12;
    pen.fillStyle = css("--accent");
    pen.fill();
    pen.globalAlpha = 1;
  }
  canvas.dataset.ms = (performance.now() - start).toFixed(2); // what a frame took, for whoever measures it
  canvas.dataset.frames = String(Number(canvas.dataset.frames || 0) + 1);
}
function redraw() {
  if (!planned) { planned = true; requestAnimationFrame(draw); }
}
function zoomBy(factor, x = width / 2, y = height / 2) {
  const next = Math.min(Math.max(zoom * factor, 0.5), 400), by = next / zoom;
  panX = x - width / 2 - (x - width / 2 - panX) * by;
  panY = y - height / 2 - (y - height / 2 - panY) * by;
  zoom = next;
  redraw();
}
function showAll() { zoom = 1; panX = 0; panY = 0; redraw(); }
function bringIn(i) {
  const x = screenX(i), y = screenY(i), edge = 40;
  if (x < edge || y < edge || x > width - edge || y > height - edge) {
    panX += width / 2 - x;
    panY += height / 2 - y;
  }
}

/* ---- tip and card ---- */
function nearest(x, y, reach) {
  let best = -1, least = reach * reach;
  const s = scale(), left = width / 2 + panX - x, top = height / 2 + panY - y;
  for (let i = 0; i < n; i += 1) {
    if (hidden[shade[i]]) continue;
    const dx = left + xs[i] * s, dy = top + ys[i] * s, d = dx * dx + dy * dy;
    if (d < least) { least = d; best = i; }
  }
  return best;
}
function showTip(i) {
  if (i < 0) { tip.hidden = true; return; }
  tip.replaceChildren(views(i), element("b", data.ids[i]));
  for (const [name, text] of summary(i)) tip.append(element("span", `${name}: ${text}`));
  if (wrong(i)) tip.append(element("span", "wrong", "wrong"));
  tip.hidden = false;
  const x = screenX(i), y = screenY(i), gap = radius() + 10, w = tip.offsetWidth, h = tip.offsetHeight;
  tip.style.left = `${Math.max(4, x + gap + w > width - 4 ? Math.min(x - gap - w, width - w - 4) : x + gap)}px`;
  tip.style.top = `${Math.max(4, Math.min(y - h / 2, height - h - 4))}px`;
}
function hover(i) {
  if (i === hot) return;
  hot = i;
  canvas.classList.toggle("over", i >= 0 && !lassoing);
  showTip(i);
  redraw();
}
function pin(i, follow = true) {
  pinned = i;
  card.replaceChildren();
  card.classList.toggle("empty", i < 0);
  if (i < 0) {
    card.append(element("h2", "No sample chosen"), element("p", "Click or tap a dot, or find a sample by its id. Its pictures, what is known of it and its nearest neighbours appear here.", "hint"));
    redraw();
    return;
  }
  if (follow) bringIn(i);
  card.append(element("h2", data.ids[i]), views(i));
  const list = element("dl");
  for (const column of fields) {
    if (!column.card || !told(column, i)) continue;
    const off = column.role === "prediction" && wrong(i);
    list.append(element("dt", column.name), element("dd", told(column, i), off ? "wrong" : ""));
  }
  card.append(list);
  const add = element("button", picked.has(i) ? "Remove from list" : "Add to list");
  add.type = "button";
  add.style.marginTop = "10px";
  add.addEventListener("click", () => { toggle(i); add.textContent = picked.has(i) ? "Remove from list" : "Add to list"; });
  card.append(add);
  if (data.near[i].length) {
    card.append(element("h3", "Nearest in feature space (cosine)"));
    const near = element("ul", undefined, "near");
    data.near[i].forEach((other, k) => {
      const item = element("li"), button = element("button");
      button.type = "button";
      const label = fields.find((f) => f.role === "class");
      button.append(views(other, false), document.createTextNode(data.ids[other]), element("span", [data.cosine[i][k].toFixed(3), label ? told(label, other) : ""].filter(Boolean).join(" \u00b7 ")));
      button.addEventListener("click", () => choose(other));
      item.append(button);
      near.append(item);
    });
    card.append(near);
  }
  $("live").textContent = [data.ids[i], ...summary(i).map(([name, text]) => `${name} ${text}`), wrong(i) ? "wrong" : ""].filter(Boolean).join(", ");
  redraw();
}
function choose(i) { pin(i); hover(i); }

/* ---- the list ---- */
function listed() {
  const ids = [...picked].sort((a, b) => a - b).map((i) => data.ids[i]);
  $("list").value = ids.join("\n");
  $("count").textContent = String(ids.length);
  $("chosen").classList.toggle("empty", !ids.length);
  redraw();
}
function toggle(i) { if (!picked.delete(i)) picked.add(i); listed(); }
function inside(path, x, y) {
  let odd = false;
  for (let a = 0, b = path.length - 1; a < path.length; b = a, a += 1) {
    const [xa, ya] = path[a], [xb, yb] = path[b];
    if (ya > y !== yb > y && x < ((xb - xa) * (y - ya)) / (yb - ya) + xa) odd = !odd;
  }
  return odd;
}
function setLasso(on) {
  lassoing = on;
  $("lasso").setAttribute("aria-pressed", String(on));
  canvas.classList.toggle("lasso", on);
}
$("lasso").addEventListener("click", () => setLasso(!lassoing));
$("clear").addEventListener("click", () => { picked.clear(); listed(); });
$("copy").addEventListener("click", async () => {
  const list = $("list");
  try { await navigator.clipboard.writeText(list.value); } catch { list.select(); document.execCommand("copy"); }
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy ids"; }, 1500);
});

/* ---- pointer and keys ---- */
const fingers = new Map();
let moved = 0, pinch = 0;
const place = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
const spread = () => { const [a, b] = [...fingers.values()]; return [Math.hypot(a[0] - b[0], a[1] - b[1]), (a[0] + b[0]) / 2, (a[1] + b[1]) / 2]; };
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, place(event));
  if (fingers.size === 1) {
    moved = 0;
    loop = lassoing || event.shiftKey ? [place(event)] : null;
  } else if (fingers.size === 2) { loop = null; moved = 99; pinch = spread()[0]; }
});
canvas.addEventListener("pointermove", (event) => {
  const [x, y] = place(event), before = fingers.get(event.pointerId);
  if (!before) { hover(nearest(x, y, Math.max(radius() + 5, 10))); return; }
  fingers.set(event.pointerId, [x, y]);
  moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
  if (fingers.size === 2) {
    const [now, cx, cy] = spread();
    zoomBy(now / (pinch || now), cx, cy);
    pinch = now;
  } else if (loop) { loop.push([x, y]); redraw(); } else if (moved > 4) {
    panX += x - before[0];
    panY += y - before[1];
    hover(-1);
    redraw();
  }
});
function release(event) {
  const [x, y] = place(event), had = fingers.delete(event.pointerId);
  if (had && loop && loop.length > 2) {
    for (let i = 0; i < n; i += 1) if (!off.has(shade[i]) && inside(loop, screenX(i), screenY(i))) picked.add(i);
    listed();
  } else if (had && event.type === "pointerup" && moved <= 8) {
    const hit = nearest(x, y, event.pointerType === "touch" ? 24 : Math.max(radius() + 5, 10));
    pin(hit, false);
    hover(hit);
  }
  loop = null;
  redraw();
}
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", (event) => { if (!fingers.size && event.pointerType === "mouse") hover(-1); });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), ...place(event));
  hover(nearest(...place(event), 10));
}, { passive: false });
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
function step([dx, dy]) {
  if (pinned < 0) { choose(nearest(width / 2, height / 2, 1e9)); return; }
  let best = -1, least = Infinity;
  for (let i = 0; i < n; i += 1) {
    const x = xs[i] - xs[pinned], y = ys[i] - ys[pinned], along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
    if (i === pinned || along <= 0 || aside > along || off.has(shade[i])) continue;
    const d = along + 2 * aside;
    if (d < least) { least = d; best = i; }
  }
  if (best >= 0) choose(best);
}
canvas.addEventListener("keydown", (event) => {
  const key = event.key;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (ARROWS[key]) {
    if (event.shiftKey) { panX -= 60 * ARROWS[key][0]; panY -= 60 * ARROWS[key][1]; redraw(); } else step(ARROWS[key]);
  } else if (key === "+" || key === "=") zoomBy(1.4);
  else if (key === "-") zoomBy(1 / 1.4);
  else if (key === "0") showAll();
  else if (key === "Enter" && pinned >= 0) { toggle(pinned); pin(pinned); } else if (key === "Escape") { setLasso(false); hover(-1); pin(-1); } else return;
  event.preventDefault();
});
$("in").addEventListener("click", () => zoomBy(1.5));
$("out").addEventListener("click", () => zoomBy(1 / 1.5));
$("all").addEventListener("click", showAll);

/* ---- find, colour, tables ---- */
const place_of = new Map(data.ids.map((id, i) => [id, i]));
$("find").addEventListener("input", () => {
  const text = $("find").value, lower = text.toLowerCase();
  const near = text.length > 1 ? data.ids.filter((id) => id.toLowerCase().includes(lower)).slice(0, 12) : [];
  $("ids").replaceChildren(...near.map((id) => { const option = element("option"); option.value = id; return option; }));
  if (place_of.has(text)) choose(place_of.get(text));
});
$("find").addEventListener("keydown", (event) => {
  const lower = $("find").value.toLowerCase();
  if (event.key !== "Enter" || !lower) return;
  const found = data.ids.findIndex((id) => id.toLowerCase().includes(lower));
  if (found >= 0) choose(found);
});
const colour = $("colour");
colour.append(...colourable.map((column, k) => { const option = element("option", column.name); option.value = String(k); return option; }));
if (!colourable.length) colour.append(element("option", "nothing known"));
colour.addEventListener("change", () => { field = colourable[Number(colour.value)] || null; off = new Set(); paint(); });

function who(i) {
  const box = element("div", undefined, "who"), button = element("button", data.ids[i]);
  button.type = "button";
  button.addEventListener("click", () => { choose(i); canvas.scrollIntoView({ block: "center" }); });
  box.append(views(i, false), button);
  return box;
}
function fill(id, rows, cells) {
  const table = $(id), body = table.tBodies[0], more = document.querySelector(`[data-for="${id}"]`);
  let shown = 0;
  const next = () => {
    for (const row of rows.slice(shown, shown + 20)) {
      const line = element("tr");
      cells(row).forEach((cell, k) => {
        const made = element(k ? "td" : "th", undefined, "text");
        if (!k) made.scope = "row";
        made.append(cell);
        line.append(made);
      });
      body.append(line);
    }
    shown += 20;
    more.hidden = shown >= rows.length;
  };
  table.hidden = !rows.length;
  if (rows.length) next();
  more.addEventListener("click", next);
}
fill("suspects", data.suspects, ([i, given, said, score]) => [who(i), given, said, score.toFixed(2)]);
fill("pairs", data.duplicates, ([a, b, cosine, note]) => [who(a), who(b), cosine.toFixed(3), note]);

/* ---- begin ---- */
function resize() {
  const box = canvas.getBoundingClientRect();
  ratio = Math.min(window.devicePixelRatio || 1, 2);
  width = Math.max(box.width, 1);
  height = Math.max(box.height, 1);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  image = pen.createImageData(canvas.width + 2 * MARGIN, canvas.height + 2 * MARGIN);
  words = new Uint32Array(image.data.buffer);
  redraw();
}
new ResizeObserver(resize).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
order.forEach((_, i) => { order[i] = i; });
field = colourable[0] || null;
resize();
paint();
pin(-1);
listed();
})();
