// Explore: all images of the store on a map; its colours, its regions, and what is chosen on it.
import { $, address, ask, askArray, attempt, latest, make } from "./common.js";
import { drawMap, whyNotDrawn } from "./map_view.js";

const COLOURS = ["#e69f00", "#3f8fd2", "#2a9d6f", "#cc6fa8", "#d1495b", "#7d6bd1", "#8c9b2f", "#2fb5c4", "#b0713c", "#e0567a", "#5f7fa3", "#a3c14a"];
const PALE = "#8d877c"; // others, or no value
const SCALES = { // from unlike to alike: away from the ground, so that it is read without hue
  light: [[222, 214, 200], [240, 180, 90], [214, 110, 20], [140, 40, 20], [70, 10, 30]],
  dark: [[58, 54, 48], [110, 70, 40], [190, 100, 20], [246, 170, 50], [255, 240, 170]],
};
const AREA_WAIT = 300; // milliseconds that a selection rests before it is counted

export function startExplore(about, open, search) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colouring = latest();
  let map = null; // what /map said
  let view = null; // the map as it is drawn; null if it cannot be
  let coloured = null; // legend and numbers, and what they are of
  let area = null; // what is chosen: tag, corners and the number of images
  let timer = 0;
  let turn = 0;

  // --- The map

  async function load() {
    await attempt($("explore-problem"), async () => {
      $("explore-status").textContent = "Loading the map…";
      map = await ask("map");
      const missing = await whyNotDrawn();
      $("map-frame").hidden = $("explore-form").hidden = Boolean(missing);
      if (missing) {
        $("map-missing").textContent = missing;
        $("map-missing").hidden = false;
      } else {
        const numbers = new Float32Array(await askArray("map/points"));
        const half = numbers.length / 2;
        view = await drawMap($("map"), { x: numbers.slice(0, half), y: numbers.slice(half), tag: map.tag, open, say: (text) => { $("explore-status").textContent = text; }, chosen });
        await colour();
        $("map").dataset.drawn = half;
      }
      describe();
      await showRegions(missing);
    });
    if (!$("explore-problem").hidden && !view) [map, $("explore-status").textContent] = [null, ""]; // so that another visit tries again
  }

  function describe() {
    const count = map.images.toLocaleString("en");
    const what = map.explained === null ? `All ${count} images: likely neighbours lie together.`
      : `All ${count} images on the two principal axes of their vectors, which hold ${(map.explained * 100).toFixed(0)} % of the variance: neighbours here need not be neighbours.`;
    $("explore-status").textContent = map.advice ? `${what} ${map.advice}` : what;
  }

  // --- Colours and their legend

  async function colour() {
    const query = $("colour-query").value.trim();
    const column = query ? "" : $("colour-column").value;
    const asked = query ? `?query=${encodeURIComponent(query)}` : column ? `?column=${encodeURIComponent(column)}` : "";
    const signal = colouring();
    const [legend, numbers] = await Promise.all([ask(`map/legend${asked}`, undefined, signal), askArray(`map/colours${asked}`, signal)]);
    coloured = { legend, numbers: new Uint8Array(numbers), title: query || column, isWords: Boolean(query) };
    paint();
  }

  function paint() {
    if (!coloured || !view) return;
    const { legend, numbers, title, isWords } = coloured;
    if (legend.kind === "scale") {
      const colours = Array.from({ length: legend.steps }, (_, step) => onScale(step / (legend.steps - 1)));
      view.colour(numbers, [...colours, PALE], true);
      const bar = make("canvas", { width: legend.steps, height: 1 });
      const pen = bar.getContext("2d");
      colours.forEach((each, step) => { pen.fillStyle = each; pen.fillRect(step, 0, 1, 1); });
      const written = (value) => (isWords ? value.toFixed(2) : String(Number(value.toPrecision(4))));
      $("legend").replaceChildren(make("span", {}, isWords ? `cosine to “${title}”` : title), make("span", {}, `${isWords ? "≤ " : ""}${written(legend.low)}`, bar, `${isWords ? "≥ " : ""}${written(legend.high)}`), ...legend.entries.map((entry) => key(entry, PALE)));
    } else {
      const colourOf = ({ name }, place) => (["others", "none"].includes(name) && place >= legend.entries.length - 2 || place >= COLOURS.length ? PALE : COLOURS[place]);
      view.colour(numbers, legend.entries.length ? legend.entries.map(colourOf) : [COLOURS[0]], false);
      $("legend").replaceChildren(...legend.entries.map((entry, place) => key(entry, colourOf(entry, place))));
    }
  }

  function key({ name, images }, shade) {
    const dot = make("i");
    dot.style.background = shade;
    return make("span", {}, dot, `${name.slice(0, 40)} (${images.toLocaleString("en")})`);
  }

  function onScale(part) {
    const scale = SCALES[dark.matches ? "dark" : "light"];
    const place = Math.min(Math.max(part, 0), 0.9999) * (scale.length - 1);
    const [low, high] = [scale[Math.floor(place)], scale[Math.floor(place) + 1]];
    const part16 = low.map((channel, i) => Math.round(channel + (high[i] - channel) * (place % 1)).toString(16).padStart(2, "0"));
    return `#${part16.join("")}`;
  }

  // --- Regions: words on the map, and a list for who does not see it

  async function showRegions(missing) {
    const { regions } = await ask("map/regions");
    view?.label(regions.filter(({ name }) => name).map(({ x, y, level, name, images }) => ({ x, y, level, content: name, priority: images })));
    const large = regions.filter(({ level }) => level === 0);
    $("regions").hidden = !large.length;
    $("regions").open = Boolean(missing);
    $("regions-title").textContent = `The ${large.length} largest regions of the map, in words and images`;
    $("regions-list").replaceChildren(...large.map((region) => {
      const name = `${region.name || "without a name"} (${region.images.toLocaleString("en")})`;
      const title = view ? make("button", { type: "button", className: "link", title: "show it on the map" }, name) : make("strong", {}, name);
      if (view) title.addEventListener("click", () => { view.goTo(region.x, region.y, region.level); $("map").focus(); });
      const images = region.typical.map(({ id, text }) => {
        const image = make("img", { src: address("thumbnail", id), alt: text, loading: "lazy" });
        const button = make("button", { type: "button", className: "tiny", title: text }, image);
        image.addEventListener("error", () => { button.className = "words"; button.replaceChildren(text); }); // it cannot be shown
        button.addEventListener("click", () => open(id));
        return button;
      });
      return make("li", {}, title, make("div", {}, ...images));
    }));
    $("map").dataset.named = large.length;
  }

  // --- What is chosen on the map

  function chosen(corners) {
    clearTimeout(timer);
    const now = ++turn;
    if (!corners) return show(null);
    timer = setTimeout(() => attempt($("explore-problem"), async () => {
      const { images } = await ask("map/area", { tag: map.tag, corners });
      if (now === turn) show({ tag: map.tag, corners, images });
    }), AREA_WAIT);
  }

  function show(next) {
    area = next;
    $("chosen").hidden = !area;
    if (area) $("chosen-text").textContent = `${area.images.toLocaleString("en")} images chosen.`;
    $("chosen-search").disabled = !area?.images;
  }

  $("chosen-search").addEventListener("click", () => search.within(area));
  $("chosen-clear").addEventListener("click", () => view.clear());
  for (const kind of ["rectangle", "lasso"]) {
    $(`choose-${kind}`).addEventListener("click", () => {
      const now = view?.choose(kind);
      for (const each of ["rectangle", "lasso"]) $(`choose-${each}`).setAttribute("aria-pressed", each === now);
    });
  }
  $("zoom-in").addEventListener("click", () => view?.zoomBy(1.6));
  $("zoom-out").addEventListener("click", () => view?.zoomBy(1 / 1.6));
  $("zoom-all").addEventListener("click", () => view?.showAll());
  $("as-images").addEventListener("change", () => view?.showImages($("as-images").checked));
  const recolour = () => attempt($("explore-problem"), async () => { if (view) await colour(); });
  $("explore-form").addEventListener("submit", (event) => { event.preventDefault(); recolour(); });
  $("colour-column").addEventListener("change", () => { $("colour-query").value = ""; recolour(); });
  dark.addEventListener("change", paint);

  const usable = about.columns.filter(({ colours }) => colours);
  $("colour-column").append(make("option", { value: "" }, "nothing"), ...usable.map(({ name }) => make("option", { value: name }, name)));
  if (usable.length) $("colour-column").value = usable[0].name;
  return () => { if (!map) load(); };
}
