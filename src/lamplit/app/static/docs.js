// The OpenAPI description as a page; the usual pages load their scripts from other servers.
import { $, ask, make } from "./common.js";

const api = await ask("openapi.json");
const resolve = (schema) => (schema?.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema) ?? {};

function kind(schema) {
  const options = schema.anyOf?.filter(({ type }) => type !== "null");
  if (options?.length) return options.map(kind).join(" or ");
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.type === "array") return `list of ${kind(schema.items ?? {})}`;
  return schema.contentMediaType || schema.format === "binary" ? "file" : (schema.type ?? "anything");
}

function table(title, rows) {
  if (!rows.length) return null;
  const body = rows.map(([name, what, text]) => make("tr", {}, make("td", {}, make("code", {}, name)), make("td", {}, what), make("td", {}, text ?? "")));
  return make("div", {}, make("h3", {}, title), make("table", { className: "left" }, make("tbody", {}, ...body)));
}

const fields = (schema) => Object.entries(resolve(schema).properties ?? {}).map(([name, field]) =>
  [name + (resolve(schema).required?.includes(name) ? " *" : ""), kind(field), field.description]);

for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const parameters = (operation.parameters ?? []).map(({ name, required, schema, description }) => [name + (required ? " *" : ""), kind(schema), description]);
    const bodies = Object.entries(operation.requestBody?.content ?? {}).map(([type, { schema }]) => table(`Body, ${type}`, fields(schema)));
    const answer = operation.responses["200"]?.content?.["application/json"]?.schema;
    $("paths").append(make("article", { className: "panel" },
      make("h2", {}, make("code", {}, `${method.toUpperCase()} ${path}`)), make("p", {}, operation.description ?? ""),
      table("Query", parameters), ...bodies, answer ? table("Answer", fields(answer)) : make("p", { className: "quiet" }, "The answer is a JPEG.")));
  }
}
