// Shared by the parts of the page: requests to the server, elements (never from markup), errors.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Return the answer, or throw an Error whose message is a sentence. Without `body` a GET, else a POST of FormData or JSON.
export async function ask(path, body, signal) {
  const isForm = body instanceof FormData;
  const options = body === undefined ? {} : {
    method: "POST", body: isForm ? body : JSON.stringify(body), headers: isForm ? {} : { "Content-Type": "application/json" },
  };
  return (await answer(path, { ...options, signal })).json();
}

// Return the address of an image that the server draws, for this page alone.
export async function askImage(path) {
  return URL.createObjectURL(await (await answer(path, {})).blob());
}

// Return the bytes of an array.
export async function askArray(path, signal) {
  return (await answer(path, { signal })).arrayBuffer();
}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is lamplit app still running?");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Error(problem.error ?? `The server answered with status ${response.status}.`);
}

// Only the last of several requests counts: earlier ones are aborted.
export function latest() {
  let controller = new AbortController();
  return () => {
    controller.abort();
    controller = new AbortController();
    return controller.signal;
  };
}

// Run `action`; an error becomes a sentence in the element `problem`.
export async function attempt(problem, action) {
  problem.hidden = true;
  try {
    await action();
  } catch (error) {
    if (error.name === "AbortError") return;
    const sentence = error.message;
    problem.textContent = sentence.charAt(0).toUpperCase() + sentence.slice(1) + (/[.!?…]$/.test(sentence) ? "" : ".");
    problem.hidden = false;
  }
}

export const address = (kind, id) => `${kind}?id=${encodeURIComponent(id)}`;

export function frame(source, text) {
  const image = make("img", { src: source, alt: text, loading: "lazy", decoding: "async" });
  const box = make("div", { className: "frame" }, image);
  image.addEventListener("error", () => box.replaceChildren(make("span", { className: "gone" }, "cannot be shown")));
  return box;
}

export function tiles(hits, open) {
  return hits.map((hit) => {
    const text = hit.texts[0] ?? hit.name;
    const words = make("div", { className: "words" }, make("span", { className: "text" }, text), make("span", { className: "score", title: "cosine" }, hit.score.toFixed(2)));
    const tile = make("button", { type: "button", className: "tile", title: text }, frame(address("thumbnail", hit.id), ""), words);
    tile.dataset.id = hit.id;
    tile.addEventListener("click", () => open(hit.id));
    return make("li", {}, tile);
  });
}

// Images dropped onto `area` (or pasted into the page while it is seen), or chosen with `input`.
export function takeImages(area, input, take) {
  const images = (files) => [...files].filter((file) => file.type.startsWith("image/") || file.type === "");
  const give = (files) => { if (files.length) take(files); };
  area.addEventListener("dragover", (event) => { event.preventDefault(); area.classList.add("over"); });
  area.addEventListener("dragleave", () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => { event.preventDefault(); area.classList.remove("over"); give(images(event.dataTransfer.files)); });
  document.addEventListener("paste", (event) => { if (area.offsetParent) give(images(event.clipboardData.files)); });
  input.addEventListener("change", () => { give(images(input.files)); input.value = ""; });
}

export function facts(list, values) {
  list.replaceChildren(...Object.entries(values).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value ?? "–"))]));
  return list;
}
