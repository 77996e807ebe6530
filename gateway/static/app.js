// The page: one form, one request at a time; moving the slider sends again and drops the one before.

const $ = (id) => document.getElementById(id);
const form = $("form");
const STAGE_WORDS = { decode: "Reading the photo", align: "Finding the face", invert: "Inverting into the latent space", read: "Reading the sentence", edit: "Editing until the degree is right", compress: "Compressing the picture", encode: "Coding for the channel", draw: "Drawing what is sent", pictures: "Writing PNGs", propagate: "Crossing the air", receive: "Drawing what was received", queue: "Waiting for a free worker", overhead: "Hops" };
const STAGE_ORDER = ["queue", "read", "decode", "align", "invert", "edit", "compress", "encode", "draw", "pictures", "propagate", "receive", "overhead"];
const COLOURS = { queue: "--s6", decode: "--s6", align: "--s3", invert: "--s1", read: "--s4", edit: "--s2", compress: "--s3", encode: "--s5", draw: "--s1", pictures: "--s6", propagate: "--s5", receive: "--s3", overhead: "--s6" };
const SUGGESTIONS = ["make the smile bigger", "give him a fuller beard", "add eyeglasses", "make her look younger", "remove the bangs", "-"];

let photo = null;        // File or Blob to send
let running = null;      // AbortController of the request under way
let sentOnce = false;    // the slider re-sends only after the first Send
let samplePick = 0;      // newest choice of sample wins

// The key stays in this tab: gone when it is closed, sent to nobody but this gateway.
$("key").value = sessionStorage.getItem("edsc-key") ?? "";
$("key").addEventListener("change", () => sessionStorage.setItem("edsc-key", $("key").value));
const ask = (path, options = {}) => fetch(path, { ...options, headers: { ...options.headers, ...($("key").value ? { "x-api-key": $("key").value } : {}) } });

// ---------------------------------------------------------------------------------- choosing a photo

function usePhoto(blob, name) {
  photo = blob;
  const old = $("preview").src;
  $("preview").src = URL.createObjectURL(blob);
  if (old.startsWith("blob:")) URL.revokeObjectURL(old);
  $("preview").hidden = false;
  $("filename").textContent = name;
}

$("preview").addEventListener("error", () => { $("preview").hidden = true; });

$("file").addEventListener("change", () => {
  const file = $("file").files[0];
  if (!file) return;
  samplePick += 1;
  pressSample(null);
  usePhoto(file, file.name);
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) { samplePick += 1; pressSample(null); usePhoto(file, file.name); }
  });
}

function pressSample(button) {
  for (const other of $("samples").children) other.setAttribute("aria-pressed", String(other === button));
}

async function pickSample(button, sample) {
  const mine = ++samplePick;
  pressSample(button);
  const answer = await fetch(sample.image);
  const blob = await answer.blob();
  if (mine === samplePick) usePhoto(blob, `${sample.name}, drawn by the generator`);
}

async function loadSamples() {
  const { samples } = await (await fetch("/v1/samples")).json();
  for (const sample of samples.slice(0, 12)) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = sample.name;
    const image = document.createElement("img");
    image.src = sample.image;
    image.alt = `Sample face ${sample.name}`;
    button.append(image);
    button.addEventListener("click", () => pickSample(button, sample));
    $("samples").append(button);
  }
  $("samples").hidden = samples.length === 0;
  if (samples.length && !photo) await pickSample($("samples").firstChild, samples[0]);
}

// ------------------------------------------------------------------------------------- the sentence

for (const words of SUGGESTIONS) {
  const chip = document.createElement("button");
  chip.type = "button";
  chip.textContent = words === "-" ? "no edit" : words;
  chip.addEventListener("click", () => { $("instruction").value = words; readSentence(); });
  $("chips").append(chip);
}

let reading = null;
async function readSentence() {
  reading?.abort();
  const mine = (reading = new AbortController());
  const text = $("instruction").value.trim();
  const hint = $("reading");
  hint.className = "hint";
  if (!text) { hint.textContent = "Say what to change."; return; }
  if (text === "-") { hint.textContent = "The photo is sent unedited."; return; }
  try {
    const answer = await ask("/v1/instructions", { method: "POST", signal: mine.signal, headers: { "content-type": "application/json" }, body: JSON.stringify({ text }) });
    const body = await answer.json();
    hint.textContent = answer.ok ? `Reads as ${body.description}` : body.detail;
    hint.className = answer.ok ? "hint yes" : "hint no";
  } catch (error) {
    if (error.name !== "AbortError") hint.textContent = "\u00a0";
  }
}
$("instruction").addEventListener("input", later(readSentence, 350));

// ------------------------------------------------------------------------------------- the controls

function later(action, ms) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(action, ms); };
}
const decibels = (value) => `${String(value).replace("-", "−")} dB`;

function showControls() {
  $("snr-out").textContent = decibels($("snr").value);
  $("snr").setAttribute("aria-valuetext", decibels($("snr").value));
  $("k-out").textContent = decibels($("k").value);
  $("k-row").hidden = form.elements.channel.value !== "rician";
}
const sendAgain = later(() => { if (sentOnce && photo) send(); }, 180);
for (const id of ["snr", "k"]) $(id).addEventListener("input", () => { showControls(); sendAgain(); });
for (const radio of form.elements.channel) radio.addEventListener("change", () => { showControls(); sendAgain(); });
for (const id of ["fading", "csi", "scheme"]) $(id).addEventListener("change", sendAgain);

// The schemes that are not on offer stay in the list, greyed: what they want is in their title.
let schemes = [];
async function loadSchemes() {
  ({ schemes } = await (await fetch("/v1/schemes")).json());
  const chosen = $("scheme").value;
  $("scheme").replaceChildren(...schemes.map((scheme) => {
    const option = new Option(scheme.name, scheme.name, false, scheme.name === chosen);
    option.disabled = scheme.baseline && !scheme.available;
    option.title = scheme.missing ?? scheme.description;
    return option;
  }));
  describeScheme();
}
function describeScheme() {
  const scheme = schemes.find((each) => each.name === $("scheme").value);
  const idle = schemes.find((each) => each.baseline && !each.available);
  const cost = scheme?.cbr ? `, CBR ${scheme.cbr.complex_uses.toFixed(4)} in complex uses` : "";
  const hint = scheme && !scheme.baseline && idle ? ` Some of the others are not on offer: ${idle.missing}` : "";
  $("scheme-words").textContent = scheme ? `${scheme.description}${cost}.${hint}` : "";
}
$("scheme").addEventListener("change", describeScheme);
// Their process may have come or gone since.
$("scheme").closest("details").addEventListener("toggle", () => loadSchemes().catch(() => {}));

// ------------------------------------------------------------------------------------------ sending

form.addEventListener("submit", (event) => { event.preventDefault(); send(); });

function order() {
  const data = new FormData();
  data.append("image", photo, photo.name ?? "sample.png");
  for (const name of ["instruction", "snr_db", "channel", "quality", "fading", "csi", "scheme"]) data.append(name, form.elements[name].value);
  if (form.elements.channel.value === "rician") data.append("k_factor_db", $("k").value);
  if ($("seed").value !== "") data.append("seed", $("seed").value);
  data.append("align", $("align").checked ? "true" : "false");
  return data;
}

async function send() {
  if (!photo) { showProblem({ title: "No photograph yet", detail: "Choose a photo or one of the samples first." }); return; }
  running?.abort();
  const mine = (running = new AbortController());
  sentOnce = true;
  $("problem").hidden = true;
  $("pictures").classList.add("stale");
  showProgress("Sending the photo", 0.02);
  try {
    const answer = await ask("/v1/edits", { method: "POST", body: order(), headers: { accept: "text/event-stream" }, signal: mine.signal });
    if (!answer.ok) { showProblem(await answer.json()); return; }
    let ended = false;
    for await (const { event, data } of events(answer.body)) {
      if (event === "progress") onProgress(data);
      if (event === "result") { await showResult(data); ended = true; }
      if (event === "problem") { showProblem(data); ended = true; }
    }
    if (!ended) throw new Error("the answer ended early");
  } catch (error) {
    if (mine.signal.aborted) return;  // a newer request has taken over
    showProblem({ title: "The gateway did not answer", detail: String(error.message ?? error) });
  } finally {
    // After a problem the pictures stay pale: they belong to the edit before.
    if (running === mine) { running = null; $("progress").hidden = true; }
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const event = lines.find((line) => line.startsWith("event: "));
      const data = lines.find((line) => line.startsWith("data: "));
      if (event && data) yield { event: event.slice(7), data: JSON.parse(data.slice(6)) };
    }
  }
}

// ------------------------------------------------------------------------------------------ showing

const WEIGHT = { read: [0.02, 0.01], decode: [0.03, 0.02], align: [0.05, 0.07], invert: [0.12, 0.5], edit: [0.62, 0.23], compress: [0.84, 0.01], encode: [0.85, 0.02], draw: [0.87, 0.02], propagate: [0.89, 0.02], receive: [0.91, 0.09] };

function onProgress({ stage, fraction }) {
  const [start, share] = WEIGHT[stage] ?? [0, 0];
  showProgress(STAGE_WORDS[stage] ?? stage, start + share * fraction);
}

function showProgress(words, value) {
  $("status-text").textContent = words;
  $("progress").hidden = false;
  $("progress").value = value;
}

function showProblem({ title, detail, request_id, status }) {
  if (status === 401) { $("key").closest("details").open = true; $("key").focus(); }
  const box = $("problem");
  box.replaceChildren();
  const strong = document.createElement("strong");
  strong.textContent = title;
  box.append(strong, detail ?? "");
  if (request_id) {
    const id = document.createElement("small");
    id.textContent = ` (request ${request_id.slice(0, 12)})`;
    box.append(id);
  }
  box.hidden = false;
  $("status-text").textContent = "";
}

async function showPicture(name, url, alt) {
  const image = $(`img-${name}`);
  const answer = await ask(url);
  if (!answer.ok) throw new Error((await answer.json()).detail);
  const next = new Image();
  next.src = URL.createObjectURL(await answer.blob());
  await next.decode();
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.src = next.src;
  image.alt = alt;
  image.hidden = false;
}

const percent = (ratio) => `${(100 * ratio).toFixed(2)} %`;
const duration = (ms) => (ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`);

async function showResult(answer) {
  await Promise.all([
    showPicture("aligned", answer.images.aligned, "The face, cut out and aligned"),
    showPicture("sent", answer.images.sent, `${answer.scheme.endsWith("+edit") ? "The face that was sent, edited after the channel" : "The edited face before the channel"}: ${answer.edit?.description ?? "unedited"}`),
    showPicture("received", answer.images.received, `The face as received at ${answer.snr_db} dB`),
  ]);
  $("pictures").classList.remove("stale");
  $("sent-note").textContent = answer.scheme.endsWith("+edit") ? "before the air, edited after it" : "edited, before the air";
  $("received-note").textContent = `after the air, ${decibels(answer.snr_db)}`;
  $("status-text").textContent = `Done in ${duration(answer.timings_ms.total)}.`;

  const line = $("edit-line");
  line.replaceChildren();
  if (answer.edit) {
    const strong = document.createElement("strong");
    strong.textContent = answer.edit.description;
    line.append("Read as ", strong, `, ${Math.round(100 * answer.edit.confidence)} % sure.`);
  } else line.append("Sent unedited.");
  $("notes").replaceChildren(...answer.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));

  showDegrees(answer);
  showLink(answer);
  showTimes(answer.timings_ms);
  $("facts").hidden = false;
}

function showDegrees({ degrees, edit }) {
  const rows = Object.entries(degrees.after).map(([name, after]) => {
    const before = degrees.before?.[name];
    const expected = degrees.expected[name];
    const row = document.createElement("tr");
    row.className = name === edit?.attribute ? "edited" : "";
    const head = Object.assign(document.createElement("th"), { scope: "row", textContent: name });
    const bar = document.createElement("div");
    bar.className = "bar";
    const piece = (kind, style) => { const i = document.createElement("i"); i.className = kind; Object.assign(i.style, style); bar.append(i); };
    if (before !== undefined) piece("b", { width: `${20 * before}%` });
    piece("a", { width: `${20 * after}%` });
    if (expected !== undefined) piece("e", { left: `${20 * expected}%` });
    const cell = document.createElement("td");
    cell.append(bar);
    const numbers = document.createElement("td");
    numbers.textContent = before === undefined ? `${after}` : `${before} → ${after}`;
    row.append(head, cell, numbers);
    return row;
  });
  $("degrees").tBodies[0].replaceChildren(...rows);
}

function showLink(answer) {
  const fading = answer.channel === "awgn" ? "" : `, ${answer.fading}`;
  const facts = [
    ["CBR, the paper’s count", answer.cbr.paper.toFixed(4)],
    ["CBR, complex uses", answer.cbr.complex_uses.toFixed(4)],
    ["Channel uses", `${answer.cbr.uses}${answer.cbr.pilot_uses ? ` (${answer.cbr.pilot_uses} pilots)` : ""}`],
    ...(answer.scheme === "editable-deepsc" ? [] : [["Scheme", answer.scheme]]),
    ...(answer.code ? [["Code blocks lost", `${answer.code.block_errors} of ${answer.code.blocks}`]] : []),
    ["Channel", `${answer.channel}${fading}`],
    ...(answer.channel === "rician" ? [["K-factor", decibels(answer.k_factor_db)]] : []),
    ...(answer.channel === "awgn" || answer.fading_db === null ? [] : [["Fade, |h|²", decibels(answer.fading_db.toFixed(1))]]),
    ["SNR", decibels(answer.snr_db)],
    ["Faces found", String(answer.faces_found)],
    ["Matching steps", String(answer.match_steps)],
    ["Seed", String(answer.seed)],
  ];
  $("link").replaceChildren(...facts.flatMap(([term, words]) => [
    Object.assign(document.createElement("dt"), { textContent: term }),
    Object.assign(document.createElement("dd"), { textContent: words }),
  ]));
}

function showTimes(timings) {
  const stages = STAGE_ORDER.filter((stage) => timings[stage] >= 0.05);
  const words = (stage) => `${stage} ${duration(timings[stage])}`;
  const swatch = (stage) => { const i = document.createElement("i"); i.style.background = `var(${COLOURS[stage]})`; return i; };
  $("time-total").textContent = `${duration(timings.total)} in all`;
  $("timebar").replaceChildren(...stages.map((stage) => { const i = swatch(stage); i.style.flex = `${timings[stage]} 0 0`; i.title = words(stage); return i; }));
  $("timebar").setAttribute("aria-label", stages.map(words).join(", "));
  $("timekey").replaceChildren(...stages.map((stage) => {
    const item = document.createElement("li");
    item.title = STAGE_WORDS[stage] ?? stage;
    item.append(swatch(stage), words(stage));
    return item;
  }));
}

// ----------------------------------------------------------------------------------------- starting

let wasReady = false;
async function showReady() {
  let words = "gateway not reachable", ready = false;
  try {
    const body = await (await fetch("/readyz")).json();
    const down = Object.entries(body.services).filter(([, state]) => state !== "SERVING").map(([name]) => name);
    ready = body.ready;
    words = ready ? "link ready" : `not ready: ${down.join(", ")}`;
  } catch { /* words say it */ }
  $("ready").textContent = words;
  if (ready && !wasReady) loadSchemes().catch(() => {});  // they could not be asked for before
  wasReady = ready;
  $("ready").className = `ready ${ready ? "yes" : "no"}`;
  setTimeout(showReady, ready ? 10000 : 2000);
}

showControls();
showReady();
loadSamples().catch(() => {});
readSentence();
