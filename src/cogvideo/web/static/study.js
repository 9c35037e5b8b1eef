// One trial at a time: its clips play in step; when the server has stored the answers, it sends the next trial.

let trial = null; // as the server sent it
let values = {}; // answers so far, by the name of the question
let begin = 0; // when the clips were shown
let isBusy = true; // while clips load and answers travel

const find = (id) => document.getElementById(id);
const unanswered = () => trial?.questions?.find((question) => !(question.name in values));

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function request(path, body) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(path, body && { method: "POST", headers, body: JSON.stringify(body) });
  if (response.status === 409) return request("trial"); // answered in another window
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

async function advance(path, body) {
  isBusy = true;
  update();
  try {
    await show(await request(path, body));
    find("notice").textContent = "";
    isBusy = false;
  } catch (error) {
    const reason = error instanceof TypeError ? "The server does not answer." : error.message;
    isBusy = !body || body.place !== trial.place; // else the answer can be sent again
    find("notice").textContent = `${reason} ${isBusy ? "Load this page again." : "Please answer again."}`;
  }
  update();
}

async function show(next) {
  trial = next;
  values = {};
  Object.assign(find("progress"), { max: trial.total, value: trial.answered });
  find("count").textContent = `${trial.answered} of ${trial.total}`;
  find("trial").hidden = !trial.clips;
  find("end").hidden = Boolean(trial.clips);
  if (!trial.clips) return;
  find("prompt").textContent = trial.prompt;
  find("questions").replaceChildren(...trial.questions.map(makeQuestion));
  const sides = trial.clips.length > 1 ? ["Left", "Right"] : [""];
  const options = { muted: true, playsInline: true, preload: "auto" };
  const videos = trial.clips.map((src, place) => make("video", { ...options, src, ariaLabel: `${sides[place]} clip` }));
  find("clips").replaceChildren(...videos.map((video, place) => make("figure", {}, video, sides[place])));
  update();
  await Promise.all(videos.map(loaded));
  for (const video of videos) {
    video.onended = () => videos.every((each) => each.ended) && restart(videos);
    video.ontimeupdate = () => keepStep(...videos);
  }
  restart(videos);
  begin = performance.now();
}

// Clips

function loaded(video) {
  return new Promise((resolve, reject) => {
    video.oncanplaythrough = resolve;
    video.onerror = () => reject(new Error("A clip cannot be played: tell whoever runs this study."));
  });
}

async function restart(videos) {
  const rewound = videos.map((video) => new Promise((resolve) => (video.onseeked = resolve)));
  for (const video of videos) video.currentTime = 0;
  await Promise.all(rewound);
  for (const video of videos) video.play().catch(() => {}); // gone meanwhile
}

function keepStep(left, right = left) {
  const lag = left.ended ? 0 : left.currentTime - right.currentTime; // of a busy machine
  right.playbackRate = 1 + Math.max(-0.5, Math.min(0.5, 2 * lag));
}

function pauseOrPlay() {
  const videos = [...document.querySelectorAll("video")];
  const isPlaying = videos.some((video) => !video.paused);
  for (const video of videos) {
    if (isPlaying) video.pause();
    else if (!video.ended) video.play();
  }
}

// Answers

function makeQuestion(question) {
  const legend = make("legend", { textContent: question.text });
  return make("fieldset", {}, legend, ...question.choices.map((choice) => makeChoice(question, choice)));
}

function makeChoice(question, { value, key, label }) {
  const button = make("button", { type: "button", onclick: () => choose(question, value) }, label);
  if (key !== label) button.append(make("kbd", { textContent: key }));
  Object.assign(button.dataset, { question: question.name, value });
  return button;
}

function choose(question, value) {
  if (isBusy) return;
  values[question.name] = value;
  update();
  if (trial.questions.length === 1) send();
}

function send() {
  if (isBusy || unanswered()) return;
  advance("answer", { place: trial.place, values, seconds: (performance.now() - begin) / 1000 });
}

function update() {
  const current = unanswered()?.name;
  for (const button of document.querySelectorAll("[data-question]")) {
    const { question, value } = button.dataset;
    button.disabled = isBusy;
    button.ariaPressed = String(values[question] === Number(value));
    button.parentElement.classList.toggle("current", question === current);
  }
  find("next").hidden = trial?.questions?.length === 1;
  find("next").disabled = isBusy || Boolean(current);
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !trial?.clips || isBusy) return;
  if (event.target.tagName === "BUTTON" && [" ", "Enter"].includes(event.key)) return; // a click
  const choice = unanswered()?.choices.find(({ key }) => key === event.key);
  if (choice) choose(unanswered(), choice.value);
  else if (event.key === "Enter") send();
  else if (event.key === " ") pauseOrPlay();
  else if (event.key === "Backspace") delete values[Object.keys(values).at(-1)];
  else return;
  event.preventDefault();
  update();
});

find("pause").onclick = pauseOrPlay;
find("next").onclick = send;
advance("trial");
