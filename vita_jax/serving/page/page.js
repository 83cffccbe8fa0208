// The page: a conversation over the realtime API, with microphone, camera and files.
import { words } from "/page/words.js";

const RATE = 24000;
const FRAME_SIDE = 640; // pixels of a picture's longer side
const IGNORED_MS = 1500;
const FRAME_WAIT_MS = 700; // a picture that was sent so lately is not sent again
const $ = (id) => document.getElementById(id);

const page = {
  language: (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en",
  token: new URLSearchParams(location.hash.slice(1)).get("token") || sessionStorage.getItem("token") || "",
  socket: null, context: null, player: null, microphone: null, video: null,
  state: "off", connecting: null, held: false, answering: null, stoppedAt: null, lastFrame: 0,
  entries: new Map(), // item id -> its line
  items: new Map(), // item id of an answer -> {done, cut}
  shown: [], // pictures for the next question
  adds: 0, playing: null,
};
history.replaceState(null, "", location.pathname);

// ---- what is seen ---------------------------------------------------------------------------------------------------

function say(key) { return words[page.language][key]; }

function translate() {
  document.documentElement.lang = page.language;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", say(element.dataset.label));
  }
  for (const image of document.querySelectorAll("#log img, #shown img")) image.alt = say("picture");
  for (const option of $("voice").options) option.textContent = say("voices")[option.value] || option.value;
  $("language").textContent = say("other");
  $("language").lang = say("otherTag");
  $("start").textContent = say(page.socket ? "end" : "start");
  $("start").classList.toggle("running", Boolean(page.socket));
  $("talk").textContent = say(page.held ? "release" : "holdToTalk");
  $("stop-answer").textContent = say("stopAnswer");
  $("text").placeholder = say("askHere");
  setState(page.state);
}

function setState(state) {
  page.state = state;
  $("state").dataset.state = state;
  $("state-text").textContent = say("states")[state];
}

/** What the state is when nothing special has just happened. */
function settle() {
  if (!page.socket) setState(page.connecting ? "connecting" : "off");
  else if (page.playing) setState("speaking");
  else if (page.answering) setState("thinking");
  else setState(page.microphone && $("hands-free").checked ? "listening" : "ready");
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text || "";
}

/** The line of an item in the transcript, made where there is none; its last part is the text. */
function line(id, who) {
  let entry = page.entries.get(id);
  if (!entry) {
    entry = document.createElement("li");
    entry.className = who;
    const speaker = document.createElement("b"); // who speaks is seen by the side, and read aloud from here
    speaker.className = "unseen";
    speaker.dataset.text = who;
    speaker.textContent = say(who);
    entry.append(speaker, document.createElement("span"));
    change(() => $("log").append(entry));
    page.entries.set(id, entry);
    $("welcome").hidden = true;
  }
  return entry;
}

/** Changes the transcript, whose end stays in sight unless somebody reads further up. */
function change(action) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  action();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function setText(entry, text) { change(() => { entry.lastChild.textContent = text; }); }

function addText(entry, text) { change(() => entry.lastChild.append(text)); }

function milliseconds(value) { return value === undefined ? "–" : `${Math.round(Number(value))} ms`; }

// ---- the connection -------------------------------------------------------------------------------------------------

function send(event) {
  if (page.socket?.readyState === WebSocket.OPEN) page.socket.send(JSON.stringify(event));
}

async function models() {
  const headers = page.token ? { Authorization: `Bearer ${page.token}` } : {};
  const answer = await fetch("/v1/models", { headers });
  $("token-form").hidden = answer.status !== 401;
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const [model] = (await answer.json()).data;
  $("model").textContent = model.id;
  $("voice-label").hidden = model.voices.length === 0;
  const chosen = $("voice").value;
  $("voice").replaceChildren(...model.voices.map((name) => new Option(say("voices")[name] || name, name)));
  if (model.voices.includes(chosen)) $("voice").value = chosen;
  return model;
}

function settings() {
  const turns = $("hands-free").checked ? { type: "server_vad", silence_duration_ms: 500 } : null;
  const session = {
    type: "realtime",
    audio: { input: { format: { type: "audio/pcm", rate: RATE }, turn_detection: turns } },
  };
  if (page.transcribes) session.audio.input.transcription = { model: $("model").textContent };
  if ($("voice").options.length) session.audio.output = { voice: $("voice").value };
  return { type: "session.update", session };
}

/** Opens the connection unless it is open, or somebody is opening it already. */
async function connect() {
  if (page.socket) return;
  page.connecting ??= openConnection().finally(() => {
    page.connecting = null;
    $("start").disabled = false;
    settle();
  });
  await page.connecting;
}

async function openConnection() {
  $("start").disabled = true;
  setState("connecting");
  await models();
  await openSound();
  const address = new URL("/v1/realtime", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const protocols = ["realtime"];
  if (page.token) protocols.push(`openai-insecure-api-key.${page.token}`);
  const socket = new WebSocket(address, protocols);
  await new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Error(say("refused")));
  });
  page.socket = socket;
  page.transcribes = true;
  socket.onmessage = ({ data }) => heard(JSON.parse(data));
  socket.onclose = () => disconnected(socket);
  send(settings());
  $("talk").hidden = $("hands-free").checked;
  translate();
}

function disconnected(socket) {
  if (page.socket !== socket) return;
  page.socket = null;
  page.answering = page.playing = null;
  page.items.clear();
  page.shown.splice(0);
  showWaiting();
  closeMicrophone();
  if ($("problem").hidden) problem(say("lost"));
  $("talk").hidden = true;
  $("stop-answer").disabled = true;
  translate();
  setState("off");
}

function disconnect() {
  const socket = page.socket;
  for (const item of page.items.keys()) cut(item);
  page.socket = null;
  socket?.close();
  page.answering = page.playing = null;
  page.items.clear();
  page.shown.splice(0);
  showWaiting();
  closeMicrophone();
  $("talk").hidden = true;
  $("stop-answer").disabled = true;
  translate();
  setState("off");
}

// ---- sound ----------------------------------------------------------------------------------------------------------

async function openSound() {
  if (page.context) return page.context.resume();
  page.context = new AudioContext({ latencyHint: "interactive" });
  await page.context.audioWorklet.addModule("/page/sound-worklets.js");
  page.player = new AudioWorkletNode(page.context, "player", { outputChannelCount: [2] });
  page.player.connect(page.context.destination);
  page.player.port.onmessage = ({ data }) => played(data);
}

async function openMicrophone() {
  if (page.microphone) return;
  if (!navigator.mediaDevices) throw new Error(say("noSecure"));
  const audio = { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 };
  try {
    page.microphone = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new Error(say("noMicrophone") + error.message);
  }
  if (!page.socket) return closeMicrophone(); // the conversation was ended while the browser asked
  page.source = page.context.createMediaStreamSource(page.microphone);
  page.capture = new AudioWorkletNode(page.context, "capture", { numberOfOutputs: 0 });
  page.capture.port.onmessage = ({ data }) => {
    draw(data);
    if ($("hands-free").checked || page.held) append(data);
  };
  page.source.connect(page.capture);
}

function closeMicrophone() {
  page.source?.disconnect();
  page.microphone?.getTracks().forEach((track) => track.stop());
  page.microphone = page.source = page.capture = null;
  $("level").getContext("2d").clearRect(0, 0, $("level").width, $("level").height);
}

/** Sends samples at 24 kHz. */
function append(samples) {
  send({ type: "input_audio_buffer.append", audio: base64(new Uint8Array(pcm(samples).buffer)) });
}

function pcm(samples) {
  return Int16Array.from(samples, (value) => Math.max(-32768, Math.min(32767, Math.round(value * 32768))));
}

function base64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

function samplesOf(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Float32Array.from(new Int16Array(bytes.buffer), (value) => value / 32768);
}

function draw(samples) {
  const canvas = $("level");
  const brush = canvas.getContext("2d");
  const level = Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length);
  const width = Math.min(1, Math.max(0, 1 + Math.log10(level + 1e-9) / 3)) * canvas.width;
  brush.clearRect(0, 0, canvas.width, canvas.height);
  brush.fillStyle = getComputedStyle(canvas).color;
  brush.fillRect(0, 0, width, canvas.height);
}

/** What the player says. */
function played(data) {
  if (data.kind === "began") {
    page.playing = data.item;
    if (page.stoppedAt !== null) $("heard-after").textContent = milliseconds(performance.now() - page.stoppedAt);
    page.stoppedAt = null;
    setState("speaking");
  } else if (data.kind === "waiting") {
    $("queued").textContent = `${data.seconds.toFixed(1)} s`;
    if (data.adds !== page.adds) return; // there is more on its way
    for (const [item, { done }] of page.items) if (done && !data.items.includes(item)) page.items.delete(item);
    if (page.playing && !page.items.has(page.playing)) {
      page.playing = null;
      $("stop-answer").disabled = !page.answering;
      if (page.state === "speaking") settle();
    }
  } else if (data.kind === "dropped") {
    // The conversation remembers what was heard, no more.
    const milliseconds = Math.round(1000 * data.seconds);
    send({ type: "conversation.item.truncate", item_id: data.item, content_index: 0, audio_end_ms: milliseconds });
    page.items.delete(data.item);
    if (page.playing === data.item) page.playing = null;
    if (page.state === "speaking") settle();
  }
}

/** An answer is not to be played any further. */
function cut(item) {
  if (!page.items.has(item) || page.items.get(item).cut) return;
  page.items.get(item).cut = true;
  page.entries.get(item)?.classList.add("cut");
  page.player.port.postMessage({ kind: "drop", item });
}

// ---- what the server says -------------------------------------------------------------------------------------------

const handlers = {
  "session.updated": () => settle(),
  "input_audio_buffer.speech_started": () => {
    setState("hearing");
    showFrame();
  },
  "input_audio_buffer.speech_stopped": () => {
    page.stoppedAt = performance.now();
    setState("thinking");
  },
  "vita_jax.input_audio_buffer.ignored": (event) => {
    page.stoppedAt = null;
    for (const image of page.shown.filter((one) => one.dataset.camera)) takeBack(image);
    const entry = line(event.item_id, "you");
    entry.classList.add("ignored");
    setText(entry, say("notMeant"));
    setState("ignored");
    setTimeout(() => page.state === "ignored" && settle(), IGNORED_MS);
  },
  "conversation.item.added": (event) => {
    // Pictures are shown with the question that they go with.
    const content = event.item.content;
    if (event.item.role !== "user" || content.every((part) => part.type === "input_image")) return;
    const entry = line(event.item.id, "you");
    if (!entry.lastChild.textContent) setText(entry, content.map((part) => part.text || "").join("\n") || say("spoken"));
    change(() => entry.prepend(...page.shown.splice(0)));
    $("shown").replaceChildren();
  },
  "conversation.item.input_audio_transcription.completed": (event) => {
    if (event.transcript) setText(line(event.item_id, "you"), event.transcript);
  },
  "response.created": (event) => {
    problem("");
    page.answering = event.response.id;
    for (const item of page.items.keys()) cut(item); // what is still being played of an earlier one
    $("stop-answer").disabled = false;
    if (!["hearing", "ignored"].includes(page.state)) setState("thinking");
  },
  "response.output_item.added": (event) => page.items.set(event.item.id, { done: false, cut: false }),
  "response.output_audio_transcript.delta": (event) => addText(line(event.item_id, "model"), event.delta),
  "response.output_text.delta": (event) => addText(line(event.item_id, "model"), event.delta),
  "response.output_audio.delta": (event) => {
    if (page.items.get(event.item_id)?.cut) return;
    const samples = samplesOf(event.delta);
    page.adds += 1;
    page.player.port.postMessage({ kind: "add", item: event.item_id, samples }, [samples.buffer]);
  },
  "response.done": (event) => {
    const { response } = event;
    for (const item of response.output) {
      if (page.items.has(item.id)) page.items.get(item.id).done = true;
      if (response.status === "cancelled") cut(item.id);
    }
    if (page.answering === response.id) page.answering = null;
    $("first-text").textContent = milliseconds(response.metadata.first_text_ms);
    $("first-audio").textContent = milliseconds(response.metadata.first_audio_ms);
    if (!page.playing && page.state === "thinking") settle();
    $("stop-answer").disabled = !page.playing;
  },
  "vita_jax.response.interrupted": (event) => cut(event.item_id),
  "conversation.item.input_audio_transcription.failed": () => {},
  error: ({ error }) => {
    if (error.code === "unsupported_parameter" && error.param?.endsWith("transcription")) {
      page.transcribes = false;
      send(settings());
    } else if (["response_cancel_not_active", "item_not_found"].includes(error.code)) {
      // What was to be stopped had ended by itself.
    } else {
      if (error.code !== "nothing_to_answer") problem(error.message);
      settle();
    }
  },
};

function heard(event) { handlers[event.type]?.(event); }

// ---- pictures, files, text ------------------------------------------------------------------------------------------

/** A picture of the camera or a file as a data URL of a reasonable size. */
function dataUrl(source, width, height) {
  const scale = Math.min(1, FRAME_SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

/** Gives a picture to the next question; one of the camera is forgotten if that was none. */
function showPicture(url, camera = "") {
  const image = new Image();
  image.src = url;
  image.alt = say("picture");
  image.dataset.camera = camera;
  page.shown.push(image);
  showWaiting();
  const content = [{ type: "input_image", image_url: url }];
  send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
}

function showWaiting() { $("shown").replaceChildren(...page.shown.map((shown) => shown.cloneNode())); }

function takeBack(image) {
  page.shown.splice(page.shown.indexOf(image), 1);
  showWaiting();
}

/** The camera's picture goes with the question that begins. */
function showFrame() {
  const video = $("camera");
  const now = performance.now();
  if (!page.video || !video.videoWidth || now - page.lastFrame < FRAME_WAIT_MS) return;
  page.lastFrame = now;
  showPicture(dataUrl(video, video.videoWidth, video.videoHeight), "camera");
}

async function toggleCamera() {
  try {
    if ($("use-camera").checked) {
      if (!navigator.mediaDevices) throw new Error(say("noSecure"));
      try {
        page.video = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 } } });
      } catch (error) {
        throw new Error(say("noCamera") + error.message);
      }
      $("camera").srcObject = page.video;
      $("camera").hidden = false;
      await $("camera").play();
    } else {
      page.video?.getTracks().forEach((track) => track.stop());
      page.video = null;
      $("camera").hidden = true;
    }
  } catch (error) {
    $("use-camera").checked = false;
    problem(error.message);
  }
}

async function takeFiles(files) {
  await connect();
  for (const file of files) {
    try {
      if (file.type.startsWith("image/")) {
        const picture = await createImageBitmap(file);
        showPicture(dataUrl(picture, picture.width, picture.height));
      } else {
        await playToServer(await file.arrayBuffer());
      }
    } catch {
      throw new Error(say("noFile") + file.name);
    }
  }
}

/** A sound file as if it were spoken. */
async function playToServer(data) {
  const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(data);
  const samples = decoded.getChannelData(0);
  const silence = new Float32Array(RATE);
  for (const part of $("hands-free").checked ? [samples, silence] : [samples]) {
    for (let i = 0; i < part.length; i += RATE) append(part.subarray(i, i + RATE));
  }
  if (!$("hands-free").checked) {
    send({ type: "input_audio_buffer.commit" });
    respond();
  }
}

function respond() {
  page.stoppedAt = performance.now();
  send({ type: "response.create" });
  setState("thinking");
}

async function ask(event) {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  await guarded(async () => {
    await connect();
    showFrame();
    const content = [{ type: "input_text", text }];
    send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
    respond();
  });
}

// ---- buttons --------------------------------------------------------------------------------------------------------

async function guarded(action) {
  problem("");
  try {
    await action();
  } catch (error) {
    problem(error.message);
  }
}

async function start() {
  if (page.socket) return disconnect();
  await guarded(async () => {
    await connect();
    await openMicrophone();
    settle();
  });
}

function press(event) {
  event.preventDefault();
  if (page.held || !page.socket || !page.microphone || event.button > 0) return;
  page.held = true;
  $("talk").classList.add("held");
  for (const item of page.items.keys()) cut(item);
  send({ type: "input_audio_buffer.clear" });
  showFrame();
  setState("hearing");
  $("talk").textContent = say("release");
}

function release() {
  if (!page.held) return;
  page.held = false;
  $("talk").classList.remove("held");
  $("talk").textContent = say("holdToTalk");
  send({ type: "input_audio_buffer.commit" });
  respond();
}

function stopAnswer() {
  if (page.answering) send({ type: "response.cancel" });
  for (const item of page.items.keys()) cut(item);
}

/** Whether a key means to talk: the space bar, unless it means something else where the focus is. */
function isSpace(event) {
  const focused = document.activeElement;
  return event.code === "Space" && !$("hands-free").checked
    && (focused === $("talk") || !["INPUT", "BUTTON", "SELECT", "SUMMARY"].includes(focused.tagName));
}

$("start").onclick = start;
$("stop-answer").onclick = stopAnswer;
$("talk").onpointerdown = press;
$("talk").onpointerup = $("talk").onpointercancel = $("talk").onpointerleave = release;
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("stop-answer").disabled) stopAnswer();
  else if (isSpace(event)) press(event);
});
addEventListener("keyup", (event) => event.code === "Space" && release());
addEventListener("blur", release); // a key that is let go elsewhere is not heard of
$("hands-free").onchange = () => {
  $("talk").hidden = !page.socket || $("hands-free").checked;
  if (!$("talk").hidden) $("talk").focus(); // the space bar talks at once
  send(settings());
  if (["listening", "ready"].includes(page.state)) settle();
};
$("voice").onchange = () => send(settings());
$("use-camera").onchange = toggleCamera;
$("ask").onsubmit = ask;
$("file").onchange = () => {
  const files = [...$("file").files];
  $("file").value = ""; // the same file may be given again
  guarded(() => takeFiles(files));
};
$("language").onclick = () => {
  page.language = page.language === "en" ? "zh" : "en";
  translate();
};
$("token-form").onsubmit = (event) => {
  event.preventDefault();
  page.token = $("token").value;
  sessionStorage.setItem("token", page.token);
  guarded(models);
};
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  guarded(() => takeFiles([...event.dataTransfer.files]));
});
if (page.token) sessionStorage.setItem("token", page.token);
translate();
guarded(models);
