// Search: words, an image that is dropped, or an image of the store.
import { $, address, ask, attempt, frame, latest, make, takeImages, tiles } from "./common.js";

const PAGE = 24;

function languageOf(column) {
  const code = /^(?:text|caption)_([a-z]{2,3})$/.exec(column ?? "")?.[1];
  if (!code) return null;
  return new Intl.DisplayNames(["en"], { type: "language" }).of(code);
}

export function startSearch(about, open) {
  let question = null; // {query}, {like} or {file}
  let count = 0;
  let hidden = 0; // images that are probably no answer
  let isLikely = true; // of the best one; if not even that is, all are shown
  let showsAll = false;
  let where = null;
  let area = null; // chosen on the map: tag, corners and the number of images
  const signal = latest();

  const language = languageOf(about.text_column);
  $("language").textContent = language
    ? `This model reads ${language} (tuned on the column ${about.text_column}).`
    : about.text_column && about.text_column !== "texts"
      ? `This model reads the language of the column ${about.text_column}.`
      : "This model reads the language of its captions" + (about.example ? `, such as: ${about.example.slice(0, 80)}` : ".");
  $("query").placeholder = language ? `Words in ${language}` : "What is in the image?";
  if (!about.reads_images) $("search-drop").textContent = "This model has no image tower, so it cannot search by your own images.";

  function body(offset) {
    const common = { k: PAGE, offset, ...(where ? { where } : {}), ...(area ? { area: { tag: area.tag, corners: area.corners } } : {}) };
    if (!question.file) return { ...common, ...question };
    const form = new FormData();
    form.append("image", question.file);
    for (const [name, value] of Object.entries(common)) form.append(name, name === "area" ? JSON.stringify(value) : value);
    return form;
  }

  async function find(offset = 0) {
    if (!question) return;
    $("search-status").textContent = "Searching…";
    if (!offset) $("hits").replaceChildren();
    $("more").hidden = $("unlikely").hidden = true;
    await attempt($("search-problem"), async () => {
      try {
        const { hits, min_score: least } = await ask("search", body(offset), signal());
        isLikely = least === null || (offset ? isLikely : hits.length > 0 && hits[0].score >= least);
        const likely = showsAll || !isLikely || least === null ? hits : hits.filter(({ score }) => score >= least);
        hidden = hits.length - likely.length;
        count = offset + likely.length;
        const words = question.query;
        $("hits").append(...tiles(likely, (id) => open(id, words)));
        $("more").hidden = hidden > 0 || hits.length < PAGE || count >= about.images;
        $("unlikely").hidden = !hidden;
        $("unlikely").textContent = "Show less likely images too";
        $("search-status").textContent = status(hits.length, least);
      } catch (error) {
        if (error.name !== "AbortError") $("search-status").textContent = "";
        throw error;
      }
    });
  }

  function status(found, least) {
    if (!found && !count) return "No image fits this filter.";
    const shown = `${isLikely ? "" : "Perhaps no image shows this. "}${count} images, best first; the number is the cosine.`;
    return hidden ? `${shown} ${hidden} of the nearest are hidden: they are below ${least.toFixed(2)}.` : shown;
  }

  function byImage(next, source, name) {
    question = next;
    showsAll = false;
    $("query").value = "";
    $("search-query").replaceChildren(make("img", { src: source, alt: "" }), make("span", { className: "quiet" }, name));
    find();
  }

  $("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const query = $("query").value.trim();
    if (!query) return;
    question = { query };
    showsAll = false;
    $("search-query").replaceChildren();
    find();
  });
  $("more").addEventListener("click", () => find(count));
  $("unlikely").addEventListener("click", () => { showsAll = true; find(); });
  if (about.reads_images) {
    takeImages($("search"), $("search-file"), ([file]) => byImage({ file }, URL.createObjectURL(file), `Images like ${file.name}`));
  }

  // The filter: column, comparison and value become an SQL condition.
  $("filter").hidden = !about.columns.length;
  $("filter-column").append(...about.columns.map(({ name }) => make("option", { value: name }, name)));
  function suggest() {
    const column = about.columns.find(({ name }) => name === $("filter-column").value);
    $("filter-values").replaceChildren(...(column?.values ?? []).map((value) => make("option", { value: String(value) })));
    $("filter-value").value = "";
  }
  $("filter-column").addEventListener("change", suggest);
  suggest();
  function condition() {
    const column = about.columns.find(({ name }) => name === $("filter-column").value);
    const value = $("filter-value").value;
    const quoted = column.kind === "number" && value.trim() !== "" && Number.isFinite(Number(value)) ? value.trim() : `'${value.replaceAll("'", "''")}'`;
    const name = `\`${column.name}\``;
    const contains = `'%${value.replaceAll("'", "''")}%'`;
    return { is: `${name} = ${quoted}`, has: `${name} LIKE ${contains}`, least: `${name} >= ${quoted}`, most: `${name} <= ${quoted}` }[$("filter-how").value];
  }
  function filter(next) {
    where = next;
    $("filter-clear").hidden = !next;
    $("filter").querySelector("summary").textContent = next ? `Only images with ${next}` : "Filter the images";
    find();
  }
  $("filter-form").addEventListener("submit", (event) => { event.preventDefault(); filter($("filter-value").value ? condition() : null); });
  $("filter-clear").addEventListener("click", () => { $("filter-value").value = ""; filter(null); });

  function within(next) {
    area = next;
    $("within").hidden = !area;
    if (area) $("within-text").textContent = `Only the ${area.images.toLocaleString("en")} images chosen on the map`;
    if (question) find(); else $("search-status").textContent = area ? "Type words, or drop an image: it is searched among the images that you chose." : "";
    $("query").focus();
  }
  $("within-clear").addEventListener("click", () => within(null));

  return { within, like: (id) => byImage({ like: id }, address("thumbnail", id), "Images like this one") };
}
