// The page: the address names the opened clips, the server has everything else.

import { Clip } from "./clip.js";
import { EXAMPLES } from "./examples.js";
import { address, get, isOver, on, picture, post, send, states } from "./requests.js";

const PAGE = 24; // clips of a page of the history
const LOOK = 2000; // milliseconds between looks at clips that are not followed
const find = (id) => document.getElementById(id);
const form = find("make");
const opened = new Map(); // clips by id, as the address says
const tiles = new Map(); // of the history, by id
let wanted = PAGE; // clips of the history to show
let following = new AbortController();
let filled = ""; // prompt of the opened clip, which may be replaced by that of the next one

on.away = (reason) => {
  find("away").hidden = !reason;
  find("away").textContent = `${reason}. This page keeps trying.`;
};

function tell(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

/** Run something, and say why if it cannot be done. */
async function attempt(work) {
  try {
    await work();
  } catch (error) {
    tell(error.message);
  }
}

// Opened clips

const ids = () => location.hash.slice(1).split(",").filter((id) => /^video_[0-9a-f]{32}$/.test(id));
const open = (...videos) => (location.hash = videos.map(({ id }) => id).join(","));

/** Show what the address says. */
async function route() {
  const known = (id) => opened.get(id)?.video ?? get(`/v1/videos/${id}`).catch(({ message }) => tell(message));
  const videos = await Promise.all(ids().map(known));
  const shown = videos.filter((video) => video && ids().includes(video.id));
  for (const id of opened.keys()) if (!ids().includes(id)) opened.delete(id);
  const fresh = shown.filter(({ id }) => !opened.has(id));
  for (const video of fresh) opened.set(video.id, new Clip(video, act));
  find("stage").replaceChildren(...shown.map(({ id }) => opened.get(id).root));
  const { top } = find("stage").getBoundingClientRect();
  if (fresh.length && (top < 0 || top > innerHeight / 2)) find("stage").scrollIntoView();
  find("stage").classList.toggle("grid", shown.length > 1);
  find("welcome").hidden = shown.length > 0 || !find("welcome").querySelector("button");
  for (const [id, tile] of tiles) tile.root.toggleAttribute("aria-current", opened.has(id));
  if (shown.length && [filled, ""].includes(form.prompt.value)) fill(shown[0]);
  follow();
}

/** Show news of an opened clip as they come. One connection is enough: browsers allow six for all their tabs. */
async function follow() {
  following.abort();
  following = new AbortController();
  const { signal } = following;
  const next = () => [...opened.values()].find((each) => !each.isOver);
  for (let clip = next(); clip && !document.hidden && !signal.aborted; clip = next()) {
    try {
      for await (const video of states(clip.video.id, signal)) clip.update(video);
    } catch (error) {
      if (signal.aborted) return;
      tell(error.message);
      close(clip.video.id); // deleted elsewhere
    }
    refresh();
  }
}

function close(id) {
  open(...[...opened.values()].map(({ video }) => video).filter((video) => video.id !== id));
}

function fill({ prompt, seconds, size, options }) {
  for (const input of form.elements) {
    const value = { prompt, seconds, size, ...options }[input.name] ?? "";
    if (input.type === "checkbox") input.checked = Boolean(value);
    else if (input.name) input.value = value;
  }
  filled = prompt;
}

// What can be done with a clip

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

async function show(...videos) {
  open(...videos);
  await refresh();
}

const ACTIONS = {
  open: ({ video }) => open(video),
  stop: async (clip) => clip.update(await post(`/v1/videos/${clip.video.id}/stop`)),
  again: async ({ video }) => {
    await show(await post(`/v1/videos/${video.id}/remix`, { prompt: video.prompt, seed: randomSeed() }));
  },
  vary: async ({ video }) => {
    const prompt = form.prompt.value.trim();
    form.prompt.focus();
    if (prompt === video.prompt) throw Error("Change the prompt, then press “Vary the prompt” again.");
    filled = form.prompt.value;
    await show(await post(`/v1/videos/${video.id}/remix`, { prompt }));
  },
  extend: async ({ video }) => {
    const prompt = form.prompt.value.trim() || video.prompt;
    await show(await post("/v1/videos/extensions", { prompt, video: { id: video.id }, seed: randomSeed() }));
  },
  first: (clip) => useFrame("input_reference", clip),
  last: (clip) => useFrame("last_reference", clip),
  video: ({ video }) => download(video, "video", "mp4"),
  gif: ({ video }) => download(video, "gif", "gif"),
  webp: ({ video }) => download(video, "webp", "webp"),
  delete: async ({ video }) => {
    if (!confirm("Delete this clip and its files?")) return;
    await send(`/v1/videos/${video.id}`, { method: "DELETE" });
    close(video.id);
    await refresh();
  },
};

function act(name, clip) {
  tell("");
  attempt(() => ACTIONS[name](clip));
}

async function useFrame(name, clip) {
  clip.show(clip.place);
  await slots[name].set({ id: clip.video.id, place: clip.seen });
  form.prompt.focus();
}

async function download(video, variant, suffix) {
  const href = await address(`/v1/videos/${video.id}/content?variant=${variant}`);
  const words = video.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60) ?? "clip";
  Object.assign(document.createElement("a"), { href, download: `${words}-${video.seed}.${suffix}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

// New clips

const slots = Object.fromEntries([...form.querySelectorAll(".slot")].map((root) => [root.dataset.name, new Slot(root)]));

/** A place for a picture: a file, or a frame of an earlier clip, {id, place}. */
function Slot(root) {
  const [input, image, remove] = ["input", "img", "button"].map((each) => root.querySelector(each));
  this.value = null;
  this.set = async (value) => {
    this.value = value;
    URL.revokeObjectURL(image.src);
    image.hidden = remove.hidden = !value;
    input.value = "";
    if (!value) return;
    image.alt = value.name ?? `Frame ${value.place + 1} of an earlier clip`;
    const isFile = value instanceof File;
    image.src = isFile ? URL.createObjectURL(value) : await address(`/v1/videos/${value.id}/frames/${value.place}`);
  };
  input.onchange = () => input.files[0] && this.set(input.files[0]);
  remove.onclick = () => this.set(null);
}

/** The form as the server takes it, without what is empty. */
function fields() {
  const data = new FormData(form);
  for (const [name, value] of [...data]) if (!value) data.delete(name);
  for (const [name, { value }] of Object.entries(slots)) {
    if (value instanceof File) data.set(name, value);
    else if (value) {
      data.set(`${name}[video_id]`, value.id);
      data.set(`${name}[frame]`, value.place);
    }
  }
  return data;
}

/** Queue samples with consecutive seeds. */
async function generate() {
  const first = form.seed.value === "" ? randomSeed() : form.seed.valueAsNumber;
  filled = form.prompt.value;
  const orders = Array.from({ length: form.samples.valueAsNumber }, (_, number) => {
    const data = fields();
    data.set("seed", first + number);
    return post("/v1/videos", data);
  });
  await show(...(await Promise.all(orders)));
}

form.onsubmit = async (event) => {
  event.preventDefault();
  tell("");
  find("generate").disabled = true; // until all are queued
  await attempt(generate);
  find("generate").disabled = false;
};

// History

/** Show the latest clips, and what is new about opened ones. */
async function refresh() {
  const videos = [];
  let page;
  do {
    const after = videos.length ? `&after=${videos.at(-1).id}` : "";
    page = await get(`/v1/videos?limit=${PAGE}${after}`);
    videos.push(...page.data);
  } while (page.has_more && videos.length < wanted);
  for (const video of videos) {
    opened.get(video.id)?.update(video);
    if (!tiles.has(video.id)) tiles.set(video.id, new Tile(video));
    tiles.get(video.id).update(video);
  }
  const there = videos.map(({ id }) => id);
  for (const id of tiles.keys()) if (!there.includes(id)) tiles.delete(id);
  const roots = there.map((id) => tiles.get(id).root);
  const list = find("history").querySelector(".tiles");
  if (roots.some((root, place) => root !== list.children[place]) || roots.length !== list.childElementCount) {
    list.replaceChildren(...roots);
  }
  find("older").hidden = !page.has_more;
  find("history").hidden = !videos.length;
}

/** A clip of the history. */
function Tile({ id, prompt }) {
  const root = find("tile").content.firstElementChild.cloneNode(true);
  const [thumb, caption] = root.children;
  let source = "";
  this.root = Object.assign(root, { href: `#${id}`, title: prompt });
  this.update = (video) => {
    this.video = video;
    const state = { queued: "waiting: ", in_progress: `${video.progress}%: `, failed: "failed: " }[video.status] ?? "";
    caption.textContent = `${state}${prompt}`;
    root.toggleAttribute("aria-current", opened.has(id));
    const [frame] = video.finished_frames;
    const path = video.status === "completed" ? "content?variant=thumbnail" : frame >= 0 ? `frames/${frame}` : "";
    if (!path || path === source) return;
    source = path;
    const show = (image) => thumb.replaceChildren(Object.assign(image, { alt: "" }));
    picture(`/v1/videos/${id}/${path}`).then(show, () => (source = ""));
  };
}

let isLooking = false;
async function look() {
  const isBusy = [...tiles.values()].some(({ video }) => !isOver(video));
  if (isLooking || document.hidden || !isBusy) return;
  isLooking = true;
  await attempt(refresh);
  isLooking = false;
}

// The page

let asking = null;
on.locked = () => {
  const [dialog, field] = [find("lock"), find("lock").querySelector("input")];
  asking ??= new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault();
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
      resolve(field.value);
      [asking, field.value] = [null, ""];
    };
    dialog.showModal();
  });
  return asking;
};

document.onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !find("generate").disabled) form.requestSubmit();
  else if (event.key === "Escape" && !find("lock").open) open();
};

const isPicture = ({ types }) => types.includes("Files") || types.includes("application/x-frame");
document.ondragover = (event) => isPicture(event.dataTransfer) && event.preventDefault();
document.ondrop = (event) => {
  if (!isPicture(event.dataTransfer)) return;
  event.preventDefault();
  const [id, place] = event.dataTransfer.getData("application/x-frame").split("/");
  const name = event.target.closest(".slot")?.dataset.name ?? "input_reference";
  attempt(() => slots[name].set(id ? { id, place: Number(place) } : event.dataTransfer.files[0]));
};

async function start() {
  const [model] = (await get("/v1/models")).data;
  find("model").textContent = `model ${model.id}`;
  form.size.append(...model.sizes.map((size) => new Option(size)));
  const choose = (prompt) => () => {
    form.prompt.value = prompt;
    find("generate").focus();
  };
  const buttons = (EXAMPLES[model.id] ?? []).map((prompt) =>
    Object.assign(document.createElement("button"), { type: "button", textContent: prompt, onclick: choose(prompt) }),
  );
  find("welcome").querySelector(".examples").append(...buttons);
  await route();
  await refresh();
}

find("notice").onclick = () => tell("");
find("older").onclick = () => {
  wanted += PAGE;
  attempt(refresh);
};
window.onhashchange = () => attempt(route);
document.onvisibilitychange = () => {
  follow();
  attempt(refresh);
};
setInterval(look, LOOK);
attempt(start);
