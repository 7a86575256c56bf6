// Explore: a sample of the store on a canvas, as dots, or as images if there is room for them.
import { $, address, ask, attempt, latest, make } from "./common.js";

const COLOURS = ["#e69f00", "#3f8fd2", "#2a9d6f", "#cc6fa8", "#d1495b", "#7d6bd1", "#8c9b2f", "#2fb5c4", "#b0713c", "#e07a5f"];
const SIDE = 56; // of an image on the map
const OTHER = "#8d877c";
const SCALE = [[48, 40, 110], [44, 110, 142], [53, 160, 120], [150, 200, 70], [250, 215, 60]]; // dark to bright, readable without hue

function onScale(part) {
  const place = Math.min(Math.max(part, 0), 0.9999) * (SCALE.length - 1);
  const [low, high] = [SCALE[Math.floor(place)], SCALE[Math.floor(place) + 1]];
  return `rgb(${low.map((channel, i) => Math.round(channel + (high[i] - channel) * (place % 1))).join(" ")})`;
}

export function startExplore(about, open) {
  const canvas = $("canvas");
  const pen = canvas.getContext("2d");
  const signal = latest();
  const images = new Map(); // id to its thumbnail
  const cells = new Map(); // point to the middle of its image, where images are shown
  const pointers = new Map(); // id of a finger or mouse that is down, to where it is
  let points = null;
  let view = { x: 0, y: 0, zoom: 1 };
  let chosen = null;
  let moved = false;
  let waiting = false;

  // --- Places: of a point on the canvas, in CSS pixels, and back

  function scale() {
    return { x: (canvas.clientWidth / 2 - 26) * view.zoom, y: (canvas.clientHeight / 2 - 26) * view.zoom };
  }
  function placeOf(point) {
    const by = scale();
    return { x: canvas.clientWidth / 2 + (point.x - view.x) * by.x, y: canvas.clientHeight / 2 - (point.y - view.y) * by.y };
  }
  function seen(point) { // where it is to the eye
    return cells.get(point) ?? placeOf(point);
  }
  function pointable() {
    return cells.size ? [...cells.keys()] : points ?? [];
  }
  function zoomBy(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const before = scale();
    view.zoom = Math.min(Math.max(view.zoom * factor, 1), 40);
    const after = scale();
    view.x += (x - canvas.clientWidth / 2) * (1 / before.x - 1 / after.x);
    view.y -= (y - canvas.clientHeight / 2) * (1 / before.y - 1 / after.y);
    keepInside();
  }
  function keepInside() {
    const room = 1 - 1 / view.zoom;
    view.x = Math.min(Math.max(view.x, -room), room);
    view.y = Math.min(Math.max(view.y, -room), room);
    draw();
  }

  // --- Drawing

  function draw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; paint(); });
  }

  function paint() {
    if (!points || !canvas.clientWidth) return;
    const dense = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * dense;
    canvas.height = canvas.clientHeight * dense;
    pen.scale(dense, dense);
    const style = getComputedStyle(document.documentElement);
    const radius = Math.min(3.5 + view.zoom * 0.6 + 200 / points.length, 9);
    for (const point of points) {
      const { x, y } = placeOf(point);
      if (x < -9 || y < -9 || x > canvas.clientWidth + 9 || y > canvas.clientHeight + 9) continue;
      pen.globalAlpha = 0.85;
      pen.fillStyle = point.colour;
      pen.beginPath();
      pen.arc(x, y, radius, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
    cells.clear();
    if ($("as-images").checked) paintImages();
    if (chosen) {
      const { x, y } = seen(chosen);
      pen.lineWidth = 4;
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.beginPath();
      if (cells.has(chosen)) pen.rect(x - SIDE / 2, y - SIDE / 2, SIDE, SIDE); else pen.arc(x, y, radius + 4, 0, 7);
      pen.stroke();
    }
  }

  function paintImages() {
    const side = SIDE;
    const taken = new Set();
    const [columns, rows] = [Math.floor(canvas.clientWidth / side), Math.floor(canvas.clientHeight / side)];
    const [margin, above] = [(canvas.clientWidth - columns * side) / 2, (canvas.clientHeight - rows * side) / 2];
    for (const point of [...points].reverse()) { // the most similar first
      const { x, y } = placeOf(point);
      const [column, row] = [Math.floor((x - margin) / side), Math.floor((y - above) / side)];
      const cell = `${column} ${row}`;
      if (taken.has(cell) || column < 0 || row < 0 || column >= columns || row >= rows) continue;
      taken.add(cell);
      const image = thumbnail(point.id);
      const left = margin + column * side + 1;
      const top = above + row * side + 1;
      const edge = side - 2;
      cells.set(point, { x: left + edge / 2, y: top + edge / 2 });
      pen.fillStyle = "#fdfbf6";
      pen.fillRect(left, top, edge, edge);
      if (image.complete && image.naturalWidth) {
        const by = Math.min((edge - 6) / image.naturalWidth, (edge - 6) / image.naturalHeight);
        const [width, height] = [image.naturalWidth * by, image.naturalHeight * by];
        pen.drawImage(image, left + (edge - width) / 2, top + (edge - height) / 2, width, height);
      }
      pen.lineWidth = 2.5;
      pen.strokeStyle = point.colour;
      pen.strokeRect(left + 1, top + 1, edge - 2, edge - 2);
    }
  }

  function thumbnail(id) {
    if (!images.has(id)) {
      const image = new Image();
      image.addEventListener("load", draw);
      image.src = address("thumbnail", id);
      images.set(id, image);
    }
    return images.get(id);
  }

  // --- Colours and their legend

  function colour(name, isWords) {
    const values = points.map(({ value }) => value);
    const numbers = values.filter((value) => typeof value === "number");
    if (!name) {
      for (const point of points) point.colour = COLOURS[0];
      $("legend").replaceChildren();
    } else if (numbers.length && numbers.length === values.filter((value) => value !== null).length) {
      const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
      for (const point of points) point.colour = point.value === null ? OTHER : onScale((point.value - low) / (high - low || 1));
      points.sort((one, other) => (one.value ?? -Infinity) - (other.value ?? -Infinity)); // the most similar lie on top
      const bar = make("canvas", { width: 180, height: 1 });
      for (let i = 0; i < 180; i++) { bar.getContext("2d").fillStyle = onScale(i / 180); bar.getContext("2d").fillRect(i, 0, 1, 1); }
      const written = (value) => (isWords ? value.toFixed(2) : String(value));
      const best = points.at(-1);
      $("legend").replaceChildren(make("span", {}, isWords ? `cosine to “${name}”` : name), make("span", {}, written(low), bar, written(high)),
        ...(isWords ? [make("span", {}, `nearest: ${best.text || best.id}`)] : []));
    } else {
      const counts = new Map();
      for (const value of values) counts.set(String(value ?? "none"), (counts.get(String(value ?? "none")) ?? 0) + 1);
      const named = [...counts].sort((one, other) => other[1] - one[1]);
      const colours = new Map(named.slice(0, COLOURS.length).map(([value], i) => [value, COLOURS[i]]));
      for (const point of points) point.colour = colours.get(String(point.value ?? "none")) ?? OTHER;
      const rest = named.slice(COLOURS.length).reduce((sum, [, count]) => sum + count, 0);
      const items = [...named.slice(0, COLOURS.length), ...(rest ? [["others", rest]] : [])];
      $("legend").replaceChildren(...items.map(([value, count]) => {
        const dot = make("i");
        dot.style.background = colours.get(value) ?? OTHER;
        return make("span", {}, dot, `${value.slice(0, 40)} (${count})`);
      }));
    }
  }

  async function load() {
    const query = $("colour-query").value.trim();
    const column = query ? "" : $("colour-column").value;
    await attempt($("explore-problem"), async () => {
      const asked = query ? `?query=${encodeURIComponent(query)}` : column ? `?column=${encodeURIComponent(column)}` : "";
      const answer = await ask(`map${asked}`, undefined, signal());
      points = answer.points;
      chosen = null;
      peek();
      colour(query || column, Boolean(query));
      const part = answer.points.length < answer.images ? `A sample of ${answer.points.length} of ${answer.images}` : `All ${answer.images}`;
      $("explore-status").textContent = `${part} images on the two principal axes of their vectors, which hold ${(answer.explained * 100).toFixed(0)} % of the variance.`;
      draw();
    });
  }

  // --- Pointing: mouse, fingers, keys

  function nearest(x, y, within) {
    let best = null;
    let least = within ** 2;
    for (const point of pointable()) {
      const place = seen(point);
      const far = (place.x - x) ** 2 + (place.y - y) ** 2;
      if (far <= least) [best, least] = [point, far];
    }
    return best;
  }

  function choose(point) {
    if (point === chosen) return;
    chosen = point;
    peek();
    draw();
  }

  function peek() {
    $("peek").hidden = !chosen;
    if (!chosen) return;
    const { x, y } = seen(chosen);
    $("peek-image").replaceWith(Object.assign(thumbnail(chosen.id).cloneNode(), { id: "peek-image", alt: "" })); // the last image must not stay while this one loads
    const value = typeof chosen.value === "number" ? ` · ${Number(chosen.value.toFixed(3))}` : chosen.value ? ` · ${chosen.value}` : "";
    $("peek-text").textContent = (chosen.text || chosen.id) + value;
    const [width, height] = [$("peek").offsetWidth, $("peek").offsetHeight];
    const isNarrow = canvas.clientWidth < 2 * width + 120; // there it goes into the corner that is farthest
    const [isLeft, isHigh] = [x > canvas.clientWidth / 2, y > canvas.clientHeight / 2];
    const far = cells.size ? SIDE / 2 + 6 : 16;
    const left = isNarrow ? (isLeft ? 6 : canvas.clientWidth - width - 6) : x + far + width > canvas.clientWidth ? x - far - width : x + far;
    const top = isNarrow ? (isHigh ? 6 : canvas.clientHeight - height - 60) : Math.min(Math.max(y - height / 2, 6), canvas.clientHeight - height - 6);
    Object.assign($("peek").style, { left: `${left}px`, top: `${Math.max(top, 6)}px` });
  }

  function at(event) {
    const box = canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, at(event));
    if (pointers.size === 1) moved = false;
  });
  canvas.addEventListener("pointermove", (event) => {
    const [now, before] = [at(event), pointers.get(event.pointerId)];
    if (!before) return choose(nearest(now.x, now.y, 28));
    if (Math.hypot(now.x - before.x, now.y - before.y) < 4 && !moved) return;
    moved = true;
    if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const factor = Math.hypot(now.x - other.x, now.y - other.y) / (Math.hypot(before.x - other.x, before.y - other.y) || 1);
      zoomBy(factor, (now.x + other.x) / 2, (now.y + other.y) / 2);
    } else {
      view.x -= (now.x - before.x) / scale().x;
      view.y += (now.y - before.y) / scale().y;
      keepInside();
    }
    pointers.set(event.pointerId, now);
    choose(null);
  });
  canvas.addEventListener("pointerup", (event) => {
    pointers.delete(event.pointerId);
    if (moved) return;
    const { x, y } = at(event);
    const point = nearest(x, y, 28);
    const again = point && point === chosen; // a finger has no hover: its first touch shows, its second opens
    choose(point);
    if (point && (event.pointerType === "mouse" || again)) open(point.id);
  });
  canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && !pointers.size) choose(null); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { x, y } = at(event);
    zoomBy(Math.exp(-event.deltaY / 400), x, y);
    peek();
  }, { passive: false });

  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  function step([dx, dy]) {
    const from = chosen ? seen(chosen) : { x: canvas.clientWidth / 2, y: canvas.clientHeight / 2 };
    let best = null;
    let least = Infinity;
    for (const point of pointable()) {
      const place = seen(point);
      const along = (place.x - from.x) * dx + (place.y - from.y) * dy;
      const across = Math.abs((place.x - from.x) * dy) + Math.abs((place.y - from.y) * dx);
      if (point !== chosen && along > 0.01 && along + 2.5 * across < least) [best, least] = [point, along + 2.5 * across];
    }
    if (!best) return;
    chosen = best;
    const { x, y } = seen(best);
    if (x < 20 || y < 20 || x > canvas.clientWidth - 20 || y > canvas.clientHeight - 20) {
      Object.assign(view, { x: best.x, y: best.y });
      keepInside();
    }
    peek();
    draw();
    $("explore-status").textContent = best.text || best.id;
  }
  canvas.addEventListener("keydown", (event) => {
    if (!points) return;
    if (directions[event.key]) step(directions[event.key]);
    else if (event.key === "Enter" && chosen) open(chosen.id);
    else if (event.key === "+" || event.key === "-") { zoomBy(event.key === "+" ? 1.5 : 1 / 1.5); peek(); }
    else if (event.key === "Escape") choose(null);
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("blur", () => choose(null));

  $("zoom-in").addEventListener("click", () => zoomBy(1.6));
  $("zoom-out").addEventListener("click", () => zoomBy(1 / 1.6));
  $("zoom-all").addEventListener("click", () => { view = { x: 0, y: 0, zoom: 1 }; draw(); });
  $("as-images").addEventListener("change", draw);
  $("explore-form").addEventListener("submit", (event) => { event.preventDefault(); load(); });
  $("colour-column").addEventListener("change", () => { $("colour-query").value = ""; load(); });
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const usable = about.columns.filter(({ kind, values }) => kind === "number" || values.length > 1);
  $("colour-column").append(make("option", { value: "" }, "nothing"), ...usable.map(({ name }) => make("option", { value: name }, name)));
  if (usable.length) $("colour-column").value = usable[0].name;
  return () => { if (points) draw(); else load(); };
}
