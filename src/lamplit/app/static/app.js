// The page: which part is shown, and the dialog of one image.
import { $, address, ask, askImage, attempt, facts, make, tiles } from "./common.js";
import { startSearch } from "./search.js";
import { startClassify } from "./classify.js";
import { startExplore } from "./explore.js";
import { startRun } from "./run.js";

const FIRST_CELLS = 5; // metadata that the dialog shows at once
const parts = ["search", "classify", "explore", "run"];
const shown = { search: () => {}, classify: () => {}, explore: () => {}, run: () => {} };

function show() {
  const part = parts.find((name) => location.hash === `#${name}`) ?? (location.hash === "#main" ? null : "search");
  if (part === null) return; // the link that skips the header
  for (const name of parts) $(name).hidden = name !== part;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${part}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.title = `${part[0].toUpperCase()}${part.slice(1)} · lamplit`;
  window.scrollTo(0, 0);
  shown[part]();
}

function go(part) {
  $("detail").close();
  if (location.hash === `#${part}`) show(); else location.hash = `#${part}`;
}

// The button that draws where in the image the words are read, and takes it off again.
function offerWhere(id, words, turn) {
  const button = $("detail-where");
  const say = (isShown) => {
    button.setAttribute("aria-pressed", isShown);
    $("detail-legend").textContent = isShown ? "Orange: where the words are read most in this image. Hatched: what the image tower did not see." : "";
  };
  const plain = () => { $("detail-image").src = address("image", id); say(false); };
  plain();
  button.hidden = !(about.locates && words);
  button.textContent = `Where is “${words}”?`;
  button.onclick = () => attempt($("detail-problem"), async () => {
    if (button.getAttribute("aria-pressed") === "true") return plain();
    $("detail-legend").textContent = "Looking…";
    const drawn = await askImage(`${address("where", id)}&query=${encodeURIComponent(words)}`).catch((error) => { if (turn === opened) say(false); throw error; });
    if (turn !== opened) return URL.revokeObjectURL(drawn);
    $("detail-image").addEventListener("load", () => URL.revokeObjectURL(drawn), { once: true });
    $("detail-image").src = drawn;
    say(true);
  });
}

let opened = 0;
async function openImage(id, words = null) { // words that found it, or that found an image like it
  const turn = ++opened;
  offerWhere(id, words, turn);
  $("neighbours").replaceChildren();
  $("detail-texts").replaceChildren();
  $("detail-few").replaceChildren();
  $("detail-more").hidden = true;
  $("detail-title").textContent = "…";
  $("detail-like").onclick = () => { go("search"); search.like(id); };
  $("detail-classify").onclick = () => { go("classify"); classify.addFromStore(id); };
  if (!$("detail").open) $("detail").showModal();
  $("detail").scrollTop = 0;
  await attempt($("detail-problem"), async () => {
    const item = await ask(address("item", id));
    if (turn !== opened) return;
    $("detail-title").textContent = item.texts[0] ?? item.name;
    $("detail-image").alt = item.texts[0] ?? item.name;
    $("detail-texts").replaceChildren(...item.texts.slice(1, 20).map((text) => make("li", {}, text)));
    const cells = Object.entries(item.metadata).sort(([one], [other]) => informative.has(other) - informative.has(one));
    facts($("detail-few"), { file: item.name, ...Object.fromEntries(cells.slice(0, FIRST_CELLS)) });
    $("detail-more").hidden = cells.length <= FIRST_CELLS;
    $("detail-more").open = false;
    $("detail-more").querySelector("summary").textContent = `${cells.length - FIRST_CELLS} more columns`;
    facts($("detail-more").querySelector("dl"), Object.fromEntries(cells.slice(FIRST_CELLS)));
    const { hits } = await ask("search", { like: id, k: 12 });
    if (turn === opened) $("neighbours").replaceChildren(...tiles(hits, (like) => openImage(like, words)));
  });
}
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault()); // or the browser would leave the page for the image

const about = await ask("about").catch((error) => ({ failure: error.message }));
if (about.failure) {
  $("search").hidden = false;
  $("search-problem").textContent = about.failure;
  $("search-problem").hidden = false;
  throw new Error(about.failure);
}
$("about").textContent = `${about.store} · ${about.images.toLocaleString("en")} images`;
const informative = new Set(about.columns.filter(({ kind, values, name }) => kind === "number" || values.length || name === about.text_column).map(({ name }) => name));
const search = startSearch(about, openImage);
const classify = startClassify(about);
shown.explore = startExplore(about, openImage, { within: (area) => { go("search"); search.within(area); } });
shown.run = startRun(about);
window.addEventListener("hashchange", show);
show();
document.documentElement.dataset.ready = "yes";
