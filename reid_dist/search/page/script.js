"use strict";

const $ = (id) => document.getElementById(id);
let limits = { upload_bytes: 0 };
let photo = null; // the File that is searched with
let similar = null; // or a photo of the index, a hit of an earlier search
let running = null; // AbortController of the search under way
let previewUrl = null;
let asked = false; // whether anything was searched for: the welcome must not come after it

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never innerHTML: names and dates come from people's files
  return made;
}

const counted = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (answer.status === 401) throw new Error("You are signed out: the server was started again. Reload the page.");
  let content;
  try {
    content = await answer.json();
  } catch {
    throw new Error(`The server gave an answer that is not understood (${answer.status}).`);
  }
  if (!answer.ok) throw new Error(content.error);
  return content;
}

/* ---- the index: what can be filtered by, and example queries ---- */

async function openIndex() {
  const index = await ask("api/index");
  limits = index;
  $("summary").textContent = [
    counted(index.photos, "photo", "photos"),
    index.cameras.length ? counted(index.cameras.length, "camera", "cameras") : "",
  ].filter(Boolean).join(" · ");
  for (const name of index.people) $("people").append(new Option(name, name));
  for (const name of index.cameras) $("camera").append(new Option(name, name));
  $("person-field").hidden = !index.people.length;
  $("camera-field").hidden = !index.cameras.length;
  for (const field of document.querySelectorAll(".date-field")) field.hidden = !index.has_dates;
  $("no-filters").hidden = Boolean(index.people.length || index.cameras.length || index.has_dates);
  $("photo-hint").textContent += `, up to ${Math.floor(index.upload_bytes / 2 ** 20)} MB`;
  for (const text of index.examples) $("examples").append(exampleButton(text));
  if (asked) return;
  if (index.photos) welcome();
  else showEmpty();
}

function exampleButton(text) {
  const item = element("li");
  const button = element("button", "", text);
  button.type = "button";
  button.addEventListener("click", () => {
    $("text").value = text;
    takePhoto(null);
    search();
  });
  item.append(button);
  return item;
}

/* ---- the photo to search with ---- */

function takePhoto(file) {
  photo = file;
  similar = null;
  $("photo").value = "";
  $("photo-problem").hidden = true;
  if (file && file.type && !["image/jpeg", "image/png", "image/webp"].includes(file.type)) refusePhoto("Not a JPEG, PNG or WebP photo.");
  else if (file && limits.upload_bytes && file.size > limits.upload_bytes) {
    refusePhoto(`The photo is larger than ${Math.floor(limits.upload_bytes / 2 ** 20)} MB.`);
  }
  if (previewUrl) URL.revokeObjectURL(previewUrl);
  previewUrl = photo ? URL.createObjectURL(photo) : null;
  showPreview(previewUrl, photo ? photo.name : "");
}

function refusePhoto(problem) {
  photo = null;
  $("photo-problem").textContent = problem;
  $("photo-problem").hidden = false;
}

function takeSimilar(hit) {
  takePhoto(null);
  similar = hit;
  showPreview(thumbnail(hit), hit.file);
  $("text").value = "";
  showWeight();
}

function showPreview(source, name) {
  $("preview").hidden = !source;
  $("drop-target").hidden = Boolean(source);
  if (source) $("preview-image").src = source;
  else $("preview-image").removeAttribute("src");
  $("preview-name").textContent = name;
  showWeight();
}

function showWeight() {
  $("weight-field").hidden = !($("text").value.trim() && (photo || similar));
}

function readBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The photo cannot be read; choose it again."));
    reader.readAsDataURL(file);
  });
}

/* ---- searching ---- */

async function request() {
  const body = { text: $("text").value, count: Number($("count").value) };
  if (photo) body.image = await readBase64(photo);
  if (similar) Object.assign(body, { similar: similar.number, generation: similar.generation });
  if (!$("weight-field").hidden) body.weight = Number($("weight").value);
  for (const name of ["person", "camera", "since", "until"]) if ($(name).value) body[name] = $(name).value;
  return body;
}

async function search() {
  asked = true;
  if (running) running.abort();
  if (!$("text").value.trim() && !photo && !similar) {
    showError("Nothing to search for: describe the person or choose a photo.");
    $("text").focus();
    return;
  }
  const mine = (running = new AbortController());
  showLoading();
  try {
    const body = await request();
    const found = await ask("api/search", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: mine.signal,
    });
    if (mine === running) showFound(found);
  } catch (error) {
    if (mine === running && error.name !== "AbortError") showError(error.message);
  } finally {
    if (mine === running) finish();
  }
}

function finish() {
  running = null;
  $("go").disabled = false;
  $("go").textContent = "Search";
  $("results").setAttribute("aria-busy", "false");
}

/* ---- states of the results ---- */

function show(title, note) {
  $("results-title").textContent = title;
  $("results-note").textContent = note;
  $("results-note").hidden = !note;
  $("notice").hidden = true;
  $("lists").replaceChildren();
  $("start").hidden = true;
  $("again").hidden = true;
}

function welcome() {
  show("Who are you looking for?", "Describe the person, show a photo, or both.");
  $("start").hidden = !$("examples").children.length;
}

function showNothing(title, note) {
  show(title, "");
  const box = element("div", "nothing");
  box.append(element("p", "", note));
  $("lists").append(box);
}

function showLoading() {
  show("Searching …", "");
  $("results").setAttribute("aria-busy", "true");
  $("go").disabled = true;
  $("go").textContent = "Searching …";
  const grid = element("div", "grid");
  for (let i = 0; i < Math.min(12, Number($("count").value)); i++) grid.append(element("div", "ghost"));
  $("lists").append(grid);
  bringIntoView();
}

function showError(message) {
  show("No search was made", "");
  showNotice("", message, true);
  bringIntoView();
}

function showNotice(strong, text, isError) {
  const notice = $("notice");
  notice.className = isError ? "notice error" : "notice";
  notice.setAttribute("role", isError ? "alert" : "status");
  notice.replaceChildren();
  if (strong) notice.append(element("strong", "", strong));
  notice.append(text);
  notice.hidden = false;
}

function showEmpty() {
  showNothing("This index is empty", "Add photos with python launch/search.py index, then search again.");
}

function showFound(found) {
  if (!found.photos) {
    showEmpty();
    return;
  }
  if (!found.hits.length) {
    showNothing("No photo fits the filters", "No photo of the index has this person, camera and dates. Widen or clear the filters.");
    return;
  }
  for (const hit of found.hits) hit.generation = found.generation;
  const known = found.hits.filter((hit) => hit.known);
  const below = found.hits.filter((hit) => !hit.known);
  const speed = `${found.milliseconds < 10 ? found.milliseconds.toFixed(1) : Math.round(found.milliseconds)} ms`;
  const title = found.threshold === null ? counted(found.hits.length, "most similar photo", "most similar photos") : counted(known.length, "likely match", "likely matches");
  show(title, `Most similar first, found in ${speed}. The score is the cosine similarity.`);
  $("again").hidden = false;
  const limit = found.threshold === null ? "" : found.threshold.toFixed(3);
  if (found.unknown) {
    $("results-title").textContent = "Probably unknown";
    showNotice(
      "This person is probably not among the photos.",
      `The best score, ${found.hits[0].score.toFixed(3)}, is below the threshold of ${limit}. These are the most similar photos all the same.`,
    );
  }
  if (found.cut) $("results-note").textContent += " The description is longer than the model reads: its end did not count.";
  if (found.threshold === null) {
    $("results-note").textContent += found.calibrated
      ? " Whether the person is unknown cannot be told: no threshold was calibrated for this kind of search."
      : " Something is always found: this index has no threshold to tell unknown people (search.py calibrate).";
  }
  if (known.length) $("lists").append(gridOf(known, ""));
  if (below.length && known.length) $("lists").append(element("h3", "group", `Less certain: below the threshold of ${limit}`));
  if (below.length) $("lists").append(gridOf(below, "below"));
}

function gridOf(hits, className) {
  const grid = element("ol", `grid ${className}`);
  grid.start = hits[0].rank;
  for (const hit of hits) grid.append(card(hit));
  return grid;
}

const thumbnail = (hit) => `thumbnail/${hit.generation}/${hit.number}`;
const facts = (hit) =>
  [
    ["Person", hit.person],
    ["Camera", hit.camera],
    ["Date", hit.date && hit.date.replace("T", " ")],
    ["Time", hit.time === null ? null : `${hit.time} s into the video`],
    ["File", hit.file],
  ].filter(([, value]) => value);

function brief(name, value) {
  if (name === "Date") return value.slice(0, 16); // without seconds
  return /^\d+$/.test(value) ? `${name} ${value}` : value; // a number alone says nothing
}

function card(hit) {
  const item = element("li");
  const button = element("button", "card");
  button.type = "button";
  const frame = element("span", "photo");
  const image = element("img");
  image.alt = "";
  image.loading = "lazy";
  image.addEventListener("error", () => frame.classList.add("gone"));
  image.src = thumbnail(hit);
  frame.append(image, element("span", "rank", String(hit.rank)));
  const caption = element("span", "caption");
  caption.append(element("span", "score", hit.score.toFixed(3)));
  const shown = facts(hit);
  const lines = shown.length > 1 ? shown.slice(0, -1) : shown; // the file name only where nothing else is known
  for (const [name, value] of lines) caption.append(element("span", "quiet", brief(name, value)));
  button.setAttribute("aria-label", `Rank ${hit.rank}, score ${hit.score.toFixed(3)}, ${shown.map((fact) => fact.join(" ")).join(", ")}`);
  button.append(frame, caption);
  button.addEventListener("click", () => openViewer(hit));
  item.append(button);
  return item;
}

function openViewer(hit) {
  $("viewer-title").textContent = `Rank ${hit.rank}`;
  $("viewer-verdict").textContent = hit.known ? "" : "Below the threshold: perhaps another person.";
  $("viewer-image").src = thumbnail(hit);
  $("viewer-image").alt = `Photo at rank ${hit.rank}`;
  $("viewer-facts").replaceChildren();
  for (const [name, value] of [["Score", hit.score.toFixed(4)], ...facts(hit)]) {
    $("viewer-facts").append(element("dt", "", name), element("dd", "", value));
  }
  $("similar").onclick = () => {
    $("viewer").close();
    takeSimilar(hit);
    search();
    $("results").focus({ preventScroll: true }); // the photo that had the focus is gone
  };
  $("viewer").showModal();
}

function bringIntoView() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const target = $("results");
  if (matchMedia("(max-width: 800px)").matches) target.scrollIntoView({ behavior: calm ? "auto" : "smooth" });
  else scrollTo({ top: 0 });
}

/* ---- controls ---- */

function countFilters() {
  const active = ["person", "camera", "since", "until"].filter((name) => $(name).value).length;
  $("filter-count").hidden = !active;
  $("filter-count").textContent = `${active} set`;
}

$("query").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
$("query").addEventListener("reset", () => {
  if (running) running.abort();
  finish();
  takePhoto(null);
  setTimeout(() => {
    showWeight(); // after the fields are empty
    countFilters();
  });
  welcome();
  $("text").focus();
});
$("text").addEventListener("input", showWeight);
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  search();
});
$("filters").addEventListener("input", countFilters);
$("photo").addEventListener("change", () => {
  if ($("photo").files.length) takePhoto($("photo").files[0]);
});
$("remove-photo").addEventListener("click", () => {
  takePhoto(null);
  $("photo").focus();
});
for (const name of ["dragover", "drop", "dragleave"]) {
  // On the whole page: a photo dropped beside the box must not replace the page.
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) takePhoto(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) takePhoto(file);
});
$("viewer").addEventListener("click", (event) => {
  if (event.target === $("viewer")) $("viewer").close(); // a click on the backdrop
});
$("filters").open = !matchMedia("(max-width: 800px)").matches;
openIndex().catch((error) => {
  $("summary").textContent = "";
  showError(error.message);
});
