// Draws openapi.json: paths, fields with their limits, answers. Nothing comes from elsewhere.

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const code = (text) => element("code", { textContent: text });

const spec = await (await fetch("/openapi.json")).json();
document.getElementById("origin").textContent = location.origin;

const resolve = (schema) => (schema?.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema) ?? {};

function typeOf(raw) {
  const schema = resolve(raw);
  if (raw?.allOf) return typeOf(raw.allOf[0]);
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.const !== undefined) return String(schema.const);
  if (schema.anyOf) return schema.anyOf.map(typeOf).filter((name) => name !== "null").join(" | ");
  if (schema.contentMediaType || schema.format === "binary") return "file";
  if (schema.type === "array") return `${typeOf(schema.items)}[]`;
  if (schema.type === "object" && schema.additionalProperties?.type) return `map of ${schema.additionalProperties.type}`;
  return schema.type ?? "any";
}

function limits(raw) {
  const schemas = [raw, ...(raw.anyOf ?? []), resolve(raw)];
  const find = (key) => schemas.map((schema) => schema?.[key]).find((value) => value !== undefined);
  const [low, high, length, start] = ["minimum", "maximum", "maxLength", "default"].map(find);
  const words = [];
  if (low !== undefined || high !== undefined) words.push(`${low ?? "…"} to ${high ?? "…"}`);
  if (length !== undefined) words.push(`at most ${length} characters`);
  if (start !== undefined && start !== null) words.push(`default ${start}`);
  return words.join(", ");
}

function table(head, rows) {
  const cells = (kind, values) => element("tr", {}, ...values.map((value) => element(kind, {}, value)));
  return element("table", {}, element("thead", {}, cells("th", head)), element("tbody", {}, ...rows.map((row) => cells("td", row))));
}

function fields(schema, mark) {
  const required = new Set(mark ? schema.required : []);
  return Object.entries(schema.properties ?? {}).map(([name, field]) => [
    code(required.has(name) ? `${name} *` : name),
    typeOf(field),
    [field.description ?? resolve(field).description ?? "", limits(field)].filter(Boolean).join("; ").replaceAll("`", ""),
  ]);
}

function operation(path, verb, about) {
  const body = element("div", { className: "body" });
  if (about.description) body.append(element("p", { textContent: about.description }));
  for (const [media, content] of Object.entries(about.requestBody?.content ?? {})) {
    body.append(table([media, "type", "meaning (* required)"], fields(resolve(content.schema), true)));
  }
  const headers = (about.parameters ?? []).map((one) => [code(one.required ? `${one.name} *` : one.name), one.in, [one.description, limits(one.schema)].filter(Boolean).join("; ")]);
  if (headers.length) body.append(table(["parameter", "where", "meaning (* required)"], headers));
  const answered = resolve(about.responses?.["200"]?.content?.["application/json"]?.schema);
  const result = resolve(answered.anyOf?.[0] ?? answered);
  if (result.properties) body.append(table(["answer", "type", "meaning"], fields(result, false)));
  const answers = Object.entries(about.responses ?? {}).map(([status, answer]) => [code(status), Object.keys(answer.content ?? {}).join(", "), answer.description]);
  body.append(table(["status", "media type", "meaning"], answers));
  return element("details", { className: "operation", open: path === "/v1/edits" },
    element("summary", {}, element("b", { className: "verb", textContent: verb.toUpperCase() }), code(path), element("span", { textContent: about.summary ?? "" })),
    body);
}

const groups = new Map();
for (const [path, verbs] of Object.entries(spec.paths)) {
  for (const [verb, about] of Object.entries(verbs)) {
    const tag = about.tags?.[0] ?? "other";
    if (!groups.has(tag)) groups.set(tag, [element("h2", { textContent: tag })]);
    groups.get(tag).push(operation(path, verb, about));
  }
}
document.getElementById("operations").replaceChildren(...[...groups.values()].flat());
