// Classify: images against the classes that are typed, with a bar for each class.
import { $, address, ask, attempt, frame, latest, make, takeImages } from "./common.js";

const MAX_IMAGES = 16;
const lines = (text) => [...new Set(text.split("\n").map((line) => line.trim()).filter(Boolean))];

export function startClassify(about) {
  let images = []; // {file, source} or {id, source}
  let timer = 0;
  const signal = latest();
  $("classes").value = about.classes.join("\n");
  $("classes").placeholder = "cat\ndog\nbicycle";
  $("templates").value = about.templates.join("\n");
  if (!about.reads_images) $("classify-drop").textContent = "This model has no image tower, so it reads only images of the store: open one and choose “Classify it”.";

  function bars(answer) {
    return make("ol", { className: "bars" }, ...answer.classes.map(({ name, probability, cosine }) => {
      const fill = make("div", { className: "fill" });
      fill.style.width = `${Math.max(0.5, probability * 100)}%`;
      const share = make("span", { className: "share" }, `${(probability * 100).toFixed(probability < 0.0995 ? 1 : 0)} %`);
      return make("li", { title: `cosine ${cosine.toFixed(3)}` }, make("span", {}, name), make("div", { className: "track" }, fill), share);
    }));
  }

  function card(image, answer) {
    const known = answer?.none_of_these ?? null;
    const verdict = known === null ? null : make("p", { className: "verdict" }, known ? "None of these: no class is near enough." : "Near enough to be one of these.");
    const name = image.file ? image.file.name : image.id.split("/").at(-1);
    const rest = !answer ? make("p", { className: "quiet" }, "Type at least two classes.")
      : answer.error ? make("p", { className: "problem" }, `This image cannot be used: ${answer.error}.`) : bars(answer);
    return make("article", { className: `card${known ? " none" : ""}` }, frame(image.source, ""), make("div", {}, make("h2", {}, name), rest, verdict));
  }

  function body(chosen, classes, templates) {
    if (chosen[0].id) return { ids: chosen.map(({ id }) => id), classes, templates, top: 12 };
    const form = new FormData();
    for (const { file } of chosen) form.append("images", file);
    for (const name of classes) form.append("classes", name);
    for (const template of templates) form.append("templates", template);
    form.append("top", 12);
    return form;
  }

  async function run() {
    const classes = lines($("classes").value);
    const templates = lines($("templates").value);
    $("classify-clear").hidden = !images.length;
    $("classify-status").textContent = images.length ? "" : "Drop images, or open one in Search and choose “Classify it”.";
    await attempt($("classify-problem"), async () => {
      const answers = new Map();
      if (classes.length && images.length) {
        if (!templates.length) throw new Error("There is no template; {} alone is enough.");
        $("classify-status").textContent = "Reading…";
        const own = signal();
        for (const chosen of [images.filter(({ file }) => file), images.filter(({ id }) => id)]) {
          if (!chosen.length) continue;
          try {
            const answer = await ask("classify", body(chosen, classes, templates), own);
            answer.images.forEach((each, number) => answers.set(chosen[number], each));
          } catch (error) {
            if (error.name !== "AbortError") $("classify-status").textContent = "";
            throw error;
          }
        }
        $("classify-status").textContent = `${images.length === 1 ? "One image" : `${images.length} images`}, ${classes.length === 1 ? "one class" : `${classes.length} classes`}; a bar is the probability among these classes.`;
      }
      $("classified").replaceChildren(...images.map((image) => card(image, answers.get(image))));
    });
  }

  function add(more) {
    images = [...more, ...images].slice(0, MAX_IMAGES);
    run();
  }

  for (const id of ["classes", "templates"]) {
    $(id).addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(run, 450); });
  }
  $("classify-form").addEventListener("submit", (event) => event.preventDefault());
  $("classify-clear").addEventListener("click", () => { images = []; run(); });
  if (about.reads_images) {
    takeImages($("classify"), $("classify-files"), (files) => add(files.map((file) => ({ file, source: URL.createObjectURL(file) }))));
  }
  run();
  return { addFromStore: (id) => add([{ id, source: address("thumbnail", id) }]) };
}
