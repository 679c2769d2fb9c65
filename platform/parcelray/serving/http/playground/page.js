"use strict";
// The playground: answers for an image and a question at several budgets, and the connector's anchors and attention.

const byId = (id) => document.getElementById(id);
const state = { model: null, budgets: [], costs: {}, picture: null, url: null, inspections: new Map(), lastRequest: 0 };
const SIDE = 448;

function headers() {
  const key = byId("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function call(path, body) {
  const response = await fetch(path, body === undefined ? { headers: headers() } : { method: "POST", headers: headers(), body: JSON.stringify(body) });
  const data = await response.json();
  if (!response.ok) throw new Error(data.error ? data.error.message : `Status ${response.status}`);
  return { data, response };
}

function say(text) { byId("status").textContent = text; }
function budget() { return state.budgets[Number(byId("budget").value)]; }
function number(value) { return value.toLocaleString("en", { maximumSignificantDigits: 3 }); }
function flops(value) {
  const [unit, size] = value >= 1e12 ? ["T", 1e12] : value >= 1e9 ? ["G", 1e9] : ["M", 1e6];
  return `${number(value / size)} ${unit}FLOP`;
}

async function loadModel() {
  try {
    const model = (await call("/v1/models")).data.data[0];
    Object.assign(state, { model: model.id, budgets: model.visual_tokens, costs: model.costs });
    byId("model").textContent = `${model.id}, ${model.version}`;
    const slider = byId("budget");
    slider.max = String(model.visual_tokens.length - 1);
    slider.value = slider.max;
    showBudget();
    say("");
  } catch (error) {
    byId("model").textContent = "The model cannot be loaded.";
    say(error.message);
  }
}

function showBudget() {
  const tokens = budget();
  if (tokens === undefined) return;
  byId("chosen").textContent = `${tokens} (${flops(state.costs[tokens].flops)} an image)`;
  byId("budget").setAttribute("aria-valuetext", `${tokens} visual tokens`);
  draw();
  inspect();
}

async function setPicture(blob) {
  const bitmap = await createImageBitmap(blob).catch(() => null);
  if (!bitmap) { say("This file is not an image that the browser can show."); return; }
  state.url = await new Promise((resolve) => { const reader = new FileReader(); reader.onload = () => resolve(reader.result); reader.readAsDataURL(blob); });
  state.picture = bitmap;
  state.inspections.clear();
  byId("hint").hidden = true;
  say("");
  showBudget();
}

// Anchors and attention of this image at this budget; while the slider moves, only its last position is requested.
async function inspect() {
  const tokens = budget();
  const request = ++state.lastRequest;
  if (!state.url || tokens === undefined || state.inspections.has(tokens)) { draw(); return; }
  await new Promise((resolve) => setTimeout(resolve, 120));
  if (request !== state.lastRequest) return;
  const url = state.url;
  try {
    const inspection = (await call("/playground/inspect", { url, visual_tokens: tokens })).data;
    if (url === state.url) state.inspections.set(tokens, inspection);
    draw();
  } catch (error) { say(error.message); }
}

function draw() {
  const canvas = byId("view");
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, SIDE, SIDE);
  if (!state.picture) return;
  const inspection = state.inspections.get(budget());
  // The model's input is a square: the centre of the image, or the whole image resized to it.
  const { width, height } = state.picture;
  const [across, down] = inspection && inspection.cropped ? [Math.min(width, height), Math.min(width, height)] : [width, height];
  context.imageSmoothingEnabled = width > SIDE;
  context.drawImage(state.picture, (width - across) / 2, (height - down) / 2, across, down, 0, 0, SIDE, SIDE);
  const parts = [];
  if (inspection) {
    const anchors = inspection.anchor_grid ** 2;
    parts.push(`${anchors} anchors and ${inspection.visual_tokens - anchors} queries`);
    if (byId("heat").checked && inspection.attention.length) heat(context, inspection);
    if (byId("anchors").checked && inspection.anchor_grid) grid(context, inspection.anchor_grid);
    byId("split").textContent = `${inspection.visual_tokens} visual tokens: ${parts[0]}${inspection.attention.length ? "; bright regions have high query attention" : ""}.`;
  }
  canvas.setAttribute("aria-label", inspection ? `The image at ${inspection.visual_tokens} visual tokens: ${parts[0]}` : "The image");
  canvas.dataset.budget = inspection ? String(inspection.visual_tokens) : "";
}

function heat(context, inspection) {
  const cell = SIDE / inspection.grid;
  inspection.attention.forEach((value, index) => {
    // Only the brightness changes, because questions are often about colors.
    context.fillStyle = `rgba(0, 0, 0, ${0.5 * (1 - value)})`;
    context.fillRect((index % inspection.grid) * cell, Math.floor(index / inspection.grid) * cell, cell, cell);
  });
}

function grid(context, side) {
  context.strokeStyle = "rgba(255, 255, 255, 0.9)";
  context.lineWidth = 1.5;
  context.shadowColor = "rgba(0, 0, 0, 0.9)";
  context.shadowBlur = 2;
  context.beginPath();
  for (let line = 0; line <= side; line++) {
    const at = Math.min(SIDE - 1, Math.max(1, (line * SIDE) / side));
    context.moveTo(at, 0); context.lineTo(at, SIDE);
    context.moveTo(0, at); context.lineTo(SIDE, at);
  }
  context.stroke();
  context.shadowBlur = 0;
}

async function answerAt(tokens) {
  const text = byId("prompt").value.trim();
  const content = [{ type: "text", text }];
  if (state.url) content.unshift({ type: "image_url", image_url: { url: state.url } });
  const started = performance.now();
  const { data, response } = await call("/v1/chat/completions", { model: state.model, visual_tokens: tokens, messages: [{ role: "user", content }] });
  const timing = Object.fromEntries((response.headers.get("server-timing") || "").split(", ").map((part) => part.split(";dur=")));
  return { tokens, text, answer: data.choices[0].message.content, usage: data.usage, timing, elapsed: performance.now() - started };
}

function showAnswer(result) {
  const article = document.createElement("article");
  article.dataset.budget = String(result.tokens);
  const add = (tag, name, text, parent = article) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.textContent = text;
    parent.append(element);
    return element;
  };
  const imageTokens = result.usage.prompt_tokens_details.image_tokens;
  add("h3", "", imageTokens ? `${result.tokens} visual tokens` : "Without an image");
  add("p", "prompt", result.text);
  add("p", "answer", result.answer || "(an empty answer)");
  const list = add("dl", "", "");
  const rows = {
    "prompt tokens": result.usage.prompt_tokens,
    "of these visual": imageTokens,
    "new tokens": result.usage.completion_tokens,
    "first token": `${number(Number(result.timing.first_token))} ms`,
    "in the engine": `${number(Number(result.timing.total))} ms`,
    "in the browser": `${number(result.elapsed)} ms`,
    ...(imageTokens ? { "prefill": flops(state.costs[result.tokens].flops) } : {}),
  };
  for (const [name, value] of Object.entries(rows)) { add("dt", "", name, list); add("dd", "", String(value), list); }
  byId("answers").prepend(article);
}

async function answerAll(budgets) {
  if (!state.model) { await loadModel(); if (!state.model) return; }
  if (!byId("prompt").value.trim()) { say("Write a question."); byId("prompt").focus(); return; }
  const buttons = [byId("ask"), byId("all")];
  buttons.forEach((button) => { button.disabled = true; });
  say("Waiting for the answer.");
  try {
    // Sequentially, so that each time is that of a single request; in descending order, because new answers go on top.
    // Without an image the budget changes nothing.
    const turns = state.url ? [...budgets].sort((a, b) => b - a) : [budget()];
    for (const tokens of turns) showAnswer(await answerAt(tokens));
    say(turns.length > 1 ? `Answered at ${turns.length} budgets.` : "Answered.");
  } catch (error) { say(error.message); }
  buttons.forEach((button) => { button.disabled = false; });
}

// A scene like those of the mini suite: shapes on a grid.
function example() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const context = canvas.getContext("2d");
  context.fillStyle = "#f2f2f2";
  context.fillRect(0, 0, 64, 64);
  context.fillStyle = "#2040e0";
  context.beginPath(); context.arc(20, 22, 11, 0, 7); context.fill();
  context.fillStyle = "#d02020";
  context.fillRect(38, 36, 20, 20);
  canvas.toBlob((blob) => setPicture(blob), "image/png");
}

const drop = byId("drop");
for (const name of ["dragover", "dragenter"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) setPicture(event.dataTransfer.files[0]); });
byId("file").addEventListener("change", (event) => { if (event.target.files[0]) setPicture(event.target.files[0]); });
byId("example").addEventListener("click", example);
byId("budget").addEventListener("input", showBudget);
byId("anchors").addEventListener("change", draw);
byId("heat").addEventListener("change", draw);
byId("key").addEventListener("change", loadModel);
byId("form").addEventListener("submit", (event) => { event.preventDefault(); answerAll([budget()]); });
byId("all").addEventListener("click", () => answerAll(state.budgets));
loadModel();
