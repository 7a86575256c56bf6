// The map itself: the component of embedding-atlas, with our tooltip, thumbnails, keys and selection around it.
import { address, ask, make } from "./common.js";

const SIDE = 54; // of a thumbnail on the map, in pixels
const FEW = 400; // points in view, up to which thumbnails are shown
const NEAR = 14; // pixels from a point that still mean it
const KEPT = 4000; // ids and texts of points

// Why the map cannot be drawn by this browser; null if it can.
export async function whyNotDrawn() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (adapter || document.createElement("canvas").getContext("webgl2")) return null;
  return "This browser offers neither WebGPU nor WebGL 2, and the map needs one of them to be drawn. Its regions are listed below.";
}

// Ids and texts of points by their row, asked for once.
export function itemsOf(tag) {
  const kept = new Map();
  return async (rows) => {
    const missing = rows.filter((row) => !kept.has(row));
    if (kept.size > KEPT) kept.clear();
    if (missing.length) for (const item of (await ask("map/items", { tag, rows: missing })).items) kept.set(item.row, item);
    return rows.map((row) => kept.get(row)).filter(Boolean);
  };
}

export async function drawMap(box, { x, y, tag, open, say, chosen }) {
  const { EmbeddingView } = await import("./embedding-atlas/embedding-atlas.js");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const items = itemsOf(tag);
  let viewport = null;
  let category = null;
  let thumbnails = []; // what is shown: {row, x, y}
  let showsImages = true;
  let isScale = false; // of the colours: then the highest come first
  let under = null; // the point that the keys are on
  let timer = 0;

  // --- Places. The component measures by the longer side of its box.

  const size = () => ({ width: Math.max(box.clientWidth, 50), height: Math.max(box.clientHeight, 50) });
  const unit = () => { const { width, height } = size(); return viewport.scale * Math.max(width, height) / 2; }; // pixels of one
  function whole() {
    const { width, height } = size();
    return { x: 0, y: 0, scale: 0.94 * Math.min(width, height) / Math.max(width, height) };
  }
  const placeOf = (row) => {
    const { width, height } = size();
    return { x: width / 2 + (x[row] - viewport.x) * unit(), y: height / 2 - (y[row] - viewport.y) * unit() };
  };
  function inView(most) { // rows in view, or null if there are more
    const { width, height } = size();
    const [wide, high] = [width / 2 / unit(), height / 2 / unit()];
    const [left, right, low, up] = [viewport.x - wide, viewport.x + wide, viewport.y - high, viewport.y + high];
    const found = [];
    for (let row = 0; row < x.length; row++) {
      if (x[row] >= left && x[row] <= right && y[row] >= low && y[row] <= up && found.push(row) > most) return null;
    }
    return found;
  }
  const pointOf = (row) => ({ x: x[row], y: y[row], category: category ? category[row] : 0, identifier: row });

  function nearest(atX, atY, distance) { // in units of the map
    const half = (SIDE / 2) * distance;
    const shown = thumbnails.find((each) => Math.abs(each.x - atX) < half && Math.abs(each.y - atY) < half);
    if (shown) return shown.row;
    let best = -1;
    let least = (NEAR * distance) ** 2;
    for (let row = 0; row < x.length; row++) {
      const far = (x[row] - atX) ** 2 + (y[row] - atY) ** 2;
      if (far < least) [best, least] = [row, far];
    }
    return best < 0 ? null : best;
  }

  // --- What is drawn over the points

  class Tooltip {
    constructor(node, { tooltip }) {
      this.image = make("img", { alt: "" });
      this.image.addEventListener("error", () => { this.image.hidden = true; }); // it cannot be shown
      this.text = make("p");
      this.card = make("div", { className: "peek" }, this.image, this.text);
      node.append(this.card);
      this.update({ tooltip });
    }
    async update({ tooltip }) {
      if (!tooltip || tooltip.identifier === this.row) return;
      const row = this.row = tooltip.identifier;
      const [item] = await items([row]).catch(() => []);
      if (row !== this.row || !item) return;
      this.image.hidden = false;
      this.image.src = address("thumbnail", item.id);
      this.text.textContent = item.text;
      this.card.classList.add("full");
    }
    destroy() { this.card.remove(); }
  }

  class Thumbnails {
    constructor(node, { proxy }) {
      this.layer = make("div", { className: "thumbnails" });
      this.shown = new Map();
      node.append(this.layer);
      Thumbnails.now = this;
      this.update({ proxy });
    }
    update({ proxy }) {
      this.proxy = proxy;
      const wanted = new Set(thumbnails.map(({ row }) => row));
      for (const [row, image] of this.shown) if (!wanted.has(row)) { image.remove(); this.shown.delete(row); }
      for (const { row, id } of thumbnails) {
        let image = this.shown.get(row);
        if (!image) {
          image = make("img", { alt: "", src: address("thumbnail", id), decoding: "async" });
          image.addEventListener("error", () => image.remove());
          this.shown.set(row, image);
          this.layer.append(image);
        }
        const place = proxy.location(x[row], y[row]);
        image.style.transform = `translate(${place.x - SIDE / 2}px, ${place.y - SIDE / 2}px)`;
      }
    }
    destroy() { this.layer.remove(); }
  }

  async function chooseThumbnails() {
    const rows = showsImages ? inView(FEW) : null;
    const found = [];
    if (isScale) rows?.sort((one, other) => category[other] - category[one]);
    const taken = new Map(); // cell to the place in it
    const { width, height } = size();
    for (const row of rows ?? []) {
      const place = placeOf(row);
      if (place.x < SIDE / 2 || place.y < SIDE / 2 || place.x > width - SIDE / 2 || place.y > height - SIDE / 2) continue;
      const [column, line] = [Math.floor(place.x / SIDE), Math.floor(place.y / SIDE)];
      let isFree = true;
      for (let c = column - 1; c <= column + 1; c++) for (let l = line - 1; l <= line + 1; l++) {
        const other = taken.get(`${c} ${l}`);
        if (other && Math.abs(other.x - place.x) < SIDE + 4 && Math.abs(other.y - place.y) < SIDE + 4) isFree = false;
      }
      if (!isFree || found.length >= 200) continue;
      taken.set(`${column} ${line}`, place);
      found.push(row);
    }
    const asked = viewport;
    const known = found.length ? await items(found).catch(() => []) : [];
    if (asked !== viewport) return;
    thumbnails = known.map(({ row, id }) => ({ row, id, x: x[row], y: y[row] }));
    if (Thumbnails.now) Thumbnails.now.update({ proxy: Thumbnails.now.proxy });
    box.dataset.thumbnails = thumbnails.length;
  }

  // --- The component

  function moved(next) {
    viewport = next;
    clearTimeout(timer);
    timer = setTimeout(chooseThumbnails, 150);
  }
  function look(next) {
    const [least, most] = [whole().scale / 2, whole().scale * 400];
    moved({ ...next, scale: Math.min(Math.max(next.scale, least), most) });
    view.update({ viewportState: viewport, tooltip: null });
  }
  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    return {
      brandingLink: null, clusterLabelColor: colour("--ink"), clusterLabelOutlineColor: colour("--sheet"), clusterLabelOpacity: 0.95,
      statusBarTextColor: colour("--quiet"), statusBarBackgroundColor: colour("--sheet"),
    };
  };
  const config = () => ({ mode: "points", colorScheme: dark.matches ? "dark" : "light", autoLabelEnabled: false });

  viewport = whole();
  const view = new EmbeddingView(box, {
    data: { x, y, category }, ...size(), pixelRatio: Math.min(devicePixelRatio || 1, 2), config: config(), theme: theme(),
    viewportState: viewport, labels: [], customTooltip: Tooltip, customOverlay: Thumbnails,
    querySelection: async (atX, atY, distance) => {
      const row = nearest(atX, atY, distance);
      return row === null ? null : pointOf(row);
    },
    onViewportState: moved,
    onSelection: async (points) => {
      const row = points?.at(-1)?.identifier;
      if (row === undefined) return;
      view.update({ selection: null, tooltip: null });
      const [item] = await items([row]).catch(() => []);
      if (item) open(item.id);
    },
    onRangeSelection: (value) => chosen(cornersOf(value)),
  });
  moved(viewport);

  box.querySelector("canvas").setAttribute("aria-hidden", "true"); // the list of the regions says what it shows
  // Its own status bar is too small for a finger and has no names for a screen reader: our buttons press those in it.
  const inside = { rectangle: box.querySelector('[title^="Toggle rectangle"]'), lasso: box.querySelector('[title^="Toggle lasso"]') };
  inside.lasso.closest("#map > div > div").hidden = true;
  let choosing = null;
  function choose(kind) {
    inside[kind].click();
    choosing = choosing === kind ? null : kind;
    return choosing;
  }

  function fit() {
    if (!box.clientWidth) return; // another part of the page is shown
    view.update(size());
    moved(viewport);
  }
  new ResizeObserver(fit).observe(box);
  dark.addEventListener("change", () => view.update({ config: config(), theme: theme() }));

  // --- Fingers, of which the component knows taps alone: one moves the map, two zoom, and one chooses if that is on.

  const fingers = new Map(); // id to where it is
  const asMouse = (kind, target, { clientX, clientY }) => target.dispatchEvent(new MouseEvent(kind, { clientX, clientY, bubbles: true, cancelable: true, view: window }));
  box.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch") return;
    fingers.set(event.pointerId, event);
    event.target.setPointerCapture(event.pointerId);
    if (choosing && fingers.size === 1) asMouse("mousedown", box.querySelector("svg"), event);
  });
  box.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    fingers.set(event.pointerId, event);
    if (choosing) return asMouse("mousemove", window, event);
    const other = [...fingers.values()].find((each) => each.pointerId !== event.pointerId);
    const [across, up] = [event.clientX - before.clientX, event.clientY - before.clientY];
    if (!other) return look({ x: viewport.x - across / unit(), y: viewport.y + up / unit(), scale: viewport.scale });
    const apart = (each) => Math.hypot(each.clientX - other.clientX, each.clientY - other.clientY) || 1;
    const frame = box.getBoundingClientRect(); // the middle between both stays where it is
    const [left, above] = [(event.clientX + other.clientX) / 2 - frame.left - frame.width / 2, (event.clientY + other.clientY) / 2 - frame.top - frame.height / 2];
    const scale = viewport.scale * apart(event) / apart(before);
    const part = (1 - viewport.scale / scale) / unit();
    look({ x: viewport.x + left * part - across / 2 / unit(), y: viewport.y - above * part + up / 2 / unit(), scale });
  });
  for (const kind of ["pointerup", "pointercancel"]) box.addEventListener(kind, (event) => {
    if (fingers.delete(event.pointerId) && choosing) asMouse("mouseup", window, event);
  });

  // --- Keys

  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  function step([dx, dy]) {
    const from = under === null ? viewport : { x: x[under], y: y[under] };
    const least = under === null ? 0 : 12 / unit();
    let best = null;
    let cost = Infinity;
    for (let row = 0; row < x.length; row++) {
      const [across, up] = [x[row] - from.x, y[row] - from.y];
      const along = under === null ? Math.hypot(across, up) : across * dx + up * dy;
      const aside = under === null ? 0 : Math.abs(across * dy) + Math.abs(up * dx);
      if (row !== under && along > least && along + 2.5 * aside < cost) [best, cost] = [row, along + 2.5 * aside];
    }
    if (best !== null) goTo(best);
  }
  async function goTo(row) {
    under = row;
    const place = placeOf(row);
    const { width, height } = size();
    if (place.x < 30 || place.y < 30 || place.x > width - 30 || place.y > height - 50) {
      moved({ ...viewport, x: x[row], y: y[row] });
      view.update({ viewportState: viewport });
    }
    view.update({ tooltip: pointOf(row) });
    const [item] = await items([row]).catch(() => []);
    if (item && row === under) say(item.text);
  }
  box.addEventListener("keydown", async (event) => {
    if (directions[event.key]) step(directions[event.key]);
    else if (event.key === "Enter" && under !== null) { const [item] = await items([under]); if (item) open(item.id); }
    else if (event.key === "+" || event.key === "-") zoomBy(event.key === "+" ? 1.6 : 1 / 1.6);
    else if (event.key === "Escape") { under = null; view.update({ tooltip: null }); clear(); }
    else return;
    event.preventDefault();
  });
  box.addEventListener("blur", () => { under = null; view.update({ tooltip: null }); });

  const centre = () => (under === null ? viewport : { x: x[under], y: y[under] });
  function zoomBy(factor) { look({ x: centre().x, y: centre().y, scale: viewport.scale * factor }); }
  function clear() { view.update({ rangeSelection: null }); chosen(null); }

  return {
    zoomBy, clear, choose,
    showAll: () => look(whole()),
    goTo: (atX, atY, level) => look({ x: atX, y: atY, scale: whole().scale * 4 * 2 ** level }),
    showImages: (shows) => { showsImages = shows; chooseThumbnails(); },
    colour: (numbers, colours, scale) => { [category, isScale] = [numbers, scale]; view.update({ data: { x, y, category }, categoryColors: colours }); chooseThumbnails(); },
    label: (labels) => view.update({ labels }),
  };
}

// Corners of what was chosen: a rectangle, or the line that was drawn around it.
function cornersOf(value) {
  if (!value) return null;
  if (Array.isArray(value)) return value.map(({ x, y }) => [x, y]);
  const { xMin, xMax, yMin, yMax } = value;
  return [[xMin, yMin], [xMax, yMin], [xMax, yMax], [xMin, yMax]];
}
