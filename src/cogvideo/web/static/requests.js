// Requests to the server. They are sent until it answers, so that a restart of the server is only a wait.

const KEY = "cogvideo key"; // in the storage of this tab
const RETRY = 1000;

/** What the page does when the server is away, for some reason, or locked: set by the page. */
export const on = { away: () => {}, locked: async () => "" };

export const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** The response to a request, however long the server is away or waits for a key. Throws what it refuses. */
export async function send(path, { headers = {}, signal, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const all = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
    const response = await fetch(path, { ...options, signal, headers: all }).catch(() => null);
    signal?.throwIfAborted();
    const isAway = !response || [502, 503, 504].includes(response.status);
    on.away(isAway ? await reasonOf(response) : "");
    if (response?.ok) return response;
    if (response?.status === 401) {
      if (key === sessionStorage.getItem(KEY)) sessionStorage.setItem(KEY, await on.locked());
    } else if (!isAway) {
      throw Error(await reasonOf(response));
    } else {
      await pause(RETRY);
    }
  }
}

async function reasonOf(response) {
  const body = await response?.json().catch(() => null);
  if (body?.error) return body.error.message;
  return response ? `The server answers with error ${response.status}` : "The server does not answer";
}

export const get = async (path) => (await send(path)).json();

/** Send a form or an object. If it has to be sent twice, the server takes it once. */
export async function post(path, body = {}) {
  const headers = { "Idempotency-Key": String(crypto.getRandomValues(new Uint32Array(4))) };
  const isForm = body instanceof FormData;
  if (!isForm) headers["Content-Type"] = "application/json";
  const response = await send(path, { method: "POST", headers, body: isForm ? body : JSON.stringify(body) });
  return response.json();
}

/** An address of this page for content that needs a key. Whoever asks gives it back by URL.revokeObjectURL. */
export async function address(path) {
  return URL.createObjectURL(await (await send(path)).blob());
}

/** A picture that is ready to be drawn. */
export async function picture(path) {
  const image = new Image();
  image.src = await address(path);
  await image.decode();
  return image;
}

/** The states of a video until it ends. A broken connection goes on after the last event that came. */
export async function* states(id, signal) {
  let last = "0";
  for (;;) {
    const response = await send(`/v1/videos/${id}/events`, { headers: { "Last-Event-ID": last }, signal });
    try {
      for await (const event of events(response.body)) {
        last = event.id ?? last;
        if (event.event !== "video") continue;
        const video = JSON.parse(event.data);
        yield video;
        if (isOver(video)) return;
      }
    } catch (error) {
      signal.throwIfAborted();
      if (!(error instanceof TypeError)) throw error; // which a broken connection is
    }
    await pause(RETRY);
  }
}

export const isOver = (video) => ["completed", "failed"].includes(video.status);

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      yield Object.fromEntries(block.split(/\r?\n/).map((line) => line.split(/: ?(.*)/s, 2)));
    }
  }
}
