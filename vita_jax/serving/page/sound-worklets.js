// Runs beside the page: takes the microphone's samples and plays those of answers, both at 24 kHz whatever the rate of
// the machine.
const RATE = 24000;
const BLOCK = 2400; // samples of a message, 100 ms

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.step = sampleRate / RATE;
    this.place = 0; // of the next sample that is given, counted in those that come
    this.held = new Float32Array(0);
    this.block = new Float32Array(BLOCK);
    this.filled = 0;
  }

  process(inputs) {
    const input = inputs[0][0];
    if (!input) return true;
    const all = new Float32Array(this.held.length + input.length);
    all.set(this.held);
    all.set(input, this.held.length);
    // The mean of what a given sample stands for: keeps what is too high for 24 kHz mostly out.
    const width = Math.max(1, Math.round(this.step));
    while (this.place + width + 1 <= all.length) {
      const at = Math.floor(this.place);
      const share = this.place - at;
      let sum = 0;
      for (let i = 0; i < width; i++) sum += all[at + i] * (1 - share) + all[at + i + 1] * share;
      this.block[this.filled++] = sum / width;
      if (this.filled === BLOCK) {
        this.port.postMessage(this.block.slice());
        this.filled = 0;
      }
      this.place += this.step;
    }
    const used = Math.min(Math.floor(this.place), all.length);
    this.held = all.slice(used);
    this.place -= used;
    return true;
  }
}

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = []; // {item, samples}
    this.at = 0; // in the first of them
    this.step = RATE / sampleRate;
    this.played = new Map(); // item -> samples
    this.rounds = 0;
    this.adds = 0;
    this.port.onmessage = ({ data }) => {
      if (data.kind === "add") {
        this.adds += 1;
        this.queue.push({ item: data.item, samples: data.samples });
        if (!this.played.has(data.item)) this.played.set(data.item, 0);
      } else if (data.kind === "drop") {
        this.drop(data.item);
      }
    };
  }

  drop(item) {
    if (this.queue.length && this.queue[0].item === item) this.at = 0;
    this.queue = this.queue.filter((part) => part.item !== item);
    this.port.postMessage({ kind: "dropped", item, seconds: (this.played.get(item) || 0) / RATE });
    this.played.delete(item);
  }

  process(inputs, outputs) {
    const output = outputs[0][0];
    for (let i = 0; i < output.length; i++) {
      while (this.queue.length && this.at >= this.queue[0].samples.length) {
        this.at -= this.queue[0].samples.length;
        this.queue.shift();
      }
      if (!this.queue.length) {
        this.at = 0;
        break;
      }
      const { item, samples } = this.queue[0];
      const first = Math.floor(this.at);
      const next = first + 1 < samples.length ? samples[first + 1] : samples[first];
      output[i] = samples[first] + (next - samples[first]) * (this.at - first);
      if (this.played.get(item) === 0) this.port.postMessage({ kind: "began", item });
      this.played.set(item, this.played.get(item) + this.step);
      this.at += this.step;
    }
    for (const channel of outputs[0].slice(1)) channel.set(output);
    if (++this.rounds % 32 === 0) {
      let waiting = -this.at;
      for (const part of this.queue) waiting += part.samples.length;
      const items = [...new Set(this.queue.map((part) => part.item))];
      this.port.postMessage({ kind: "waiting", seconds: Math.max(0, waiting) / RATE, items, adds: this.adds });
    }
    return true;
  }
}

registerProcessor("capture", Capture);
registerProcessor("player", Player);
