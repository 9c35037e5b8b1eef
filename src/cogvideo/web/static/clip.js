// A clip on the page: its frames in their places, as far as they are finished, and what can be done with it.

import { isOver, picture } from "./requests.js";

const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const STATES = { queued: "Waiting for its turn", in_progress: "Generating", completed: "Finished", failed: "Failed" };

export class Clip {
  isPlaying = !isCalm;
  place = 0; // up to which the clip is shown
  #frames = []; // pictures by place; null while one is on its way
  #since = null; // first news, to tell the time left
  #drawn = null; // picture on the canvas
  #wasShown = false;
  #timer = 0; // until the next frame

  /** `act(name, clip)` is called for buttons. */
  constructor(video, act) {
    this.root = document.getElementById("clip").content.firstElementChild.cloneNode(true);
    this.root.dataset.id = video.id;
    this.canvas = this.find("canvas");
    this.find(".play").onclick = () => this.play(!this.isPlaying);
    this.find(".place").oninput = (event) => this.show(event.target.valueAsNumber);
    this.find(".picture").onclick = () => act("open", this);
    for (const button of this.root.querySelectorAll("[data-action]")) {
      button.onclick = () => act(button.dataset.action, this);
    }
    this.update(video);
    this.play(this.isPlaying);
  }

  find = (selector) => this.root.querySelector(selector);

  get isOver() {
    return isOver(this.video);
  }

  /** Places of the clip: it ends with its last frame if it was stopped early. */
  get length() {
    const { status, finished_frames: done, num_frames: number } = this.video;
    return Math.max(1, status === "completed" ? Math.max(...done) + 1 : number);
  }

  /** Show a state, unless it is older than the one that is shown. */
  update(video) {
    const isOlder = video.finished_frames.length < (this.video?.finished_frames.length ?? 0);
    if (isOlder || (this.video && this.isOver)) return;
    this.video = video;
    const { status, prompt, finished_frames: done, num_frames: number, progress } = video;
    const state = video.error ? `${STATES.failed}: ${video.error.message}` : STATES[status];
    if (this.find(".state").textContent !== state) this.find(".state").textContent = state;
    this.root.dataset.status = status;
    this.root.setAttribute("aria-label", prompt);
    this.canvas.setAttribute("aria-label", `Clip: ${prompt}`);
    this.find(".prompt").textContent = prompt;
    this.find(".facts").textContent = facts(video);
    this.find("progress").value = progress;
    this.find(".left").textContent = this.isOver || !number ? "" : `${done.length} of ${number} frames${this.#left()}`;
    const states = [status, done.length && "frames", status === "completed" && done.length === number && "whole"];
    for (const part of this.root.querySelectorAll("[data-when]")) {
      part.hidden = !part.dataset.when.split(" ").some((each) => states.includes(each));
    }
    this.find(".place").max = this.length - 1;
    const strip = this.find(".strip");
    while (strip.childElementCount < this.length && number) strip.append(document.createElement("span"));
    while (strip.childElementCount > this.length) strip.lastChild.remove();
    for (const place of done) if (!(place in this.#frames)) this.#load(place);
  }

  play(isPlaying) {
    this.isPlaying = isPlaying;
    this.find(".play").textContent = isPlaying ? "Pause" : "Play";
    clearTimeout(this.#timer);
    if (isPlaying) this.#tick();
  }

  /** Stop at the last finished frame up to a place. */
  show(place) {
    this.play(false);
    this.place = place;
    this.#draw();
  }

  /** Place of the frame that is seen: the last finished one up to the place. */
  get seen() {
    const before = this.#frames.findLastIndex((each, place) => each && place <= this.place);
    return before < 0 ? this.#frames.findIndex(Boolean) : before;
  }

  async #load(place) {
    this.#frames[place] = null;
    const image = await picture(`/v1/videos/${this.video.id}/frames/${place}`).catch(() => null);
    if (!image) return; // deleted meanwhile
    this.#frames[place] = image;
    const cell = this.find(".strip").children[place];
    if (!cell) return;
    Object.assign(image, { draggable: true, alt: "", title: `Frame ${place + 1}`, onclick: () => this.show(place) });
    image.ondragstart = (event) => event.dataTransfer.setData("application/x-frame", `${this.video.id}/${place}`);
    cell.replaceChildren(image);
    this.#draw();
  }

  #left() {
    const number = this.video.finished_frames.length;
    this.#since ??= { time: Date.now(), number };
    const made = number - this.#since.number;
    if (!made) return "";
    const seconds = ((this.video.num_frames - number) * (Date.now() - this.#since.time)) / 1000 / made;
    return seconds < 90 ? `, ${Math.ceil(seconds)} s left` : `, ${Math.ceil(seconds / 60)} min left`;
  }

  #tick = () => {
    if (!this.root.isConnected && this.#wasShown) return; // closed
    this.#wasShown ||= this.root.isConnected;
    const { status, finished_frames: done, fps } = this.video;
    const period = 1000 / fps / (status === "completed" ? stepOf(done) : 1);
    const now = performance.now();
    this.place = Math.floor(now / period) % this.length;
    this.#draw();
    this.#timer = setTimeout(this.#tick, period - (now % period) + 1);
  };

  #draw() {
    const slider = this.find(".place");
    if (slider.valueAsNumber !== this.place) slider.value = this.place;
    const image = this.#frames[this.seen];
    if (!image || image === this.#drawn) return;
    this.#drawn = image;
    Object.assign(this.canvas, { width: image.naturalWidth, height: image.naturalHeight });
    this.canvas.getContext("2d").drawImage(image, 0, 0);
    slider.setAttribute("aria-valuetext", `frame ${this.seen + 1} of ${this.length}`);
  }
}

/** Places from frame to frame: 1, or more in a clip that was stopped early, as the server chooses its frames. */
export function stepOf(done) {
  let [chosen, last] = [1, 0];
  for (let step = 1; step <= Math.max(...done); step *= 2) {
    let end = 0;
    while (done.includes(end + step)) end += step;
    if (end > last) [chosen, last] = [step, end];
  }
  return chosen;
}

function facts({ seed, size, seconds, fps, options: { rounds, ...options } }) {
  const given = Object.entries(options).filter(([, value]) => value !== false);
  const texts = given.map(([name, value]) => (value === true ? name : `${name.replaceAll("_", " ")} ${value}`));
  return [`seed\u00a0${seed}`, `${seconds}\u00a0s`, `${fps}\u00a0fps`, size, ...texts].join(" · ");
}
