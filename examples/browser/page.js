// What is seen: photographs that are dropped, chosen or pasted become cards with an answer each.
import { open } from "./classifier.js";

const SHOWN = 5; // classes on a card, at most
const SEVERAL = 0.5; // with several labels an image, each that is at least this probable is an answer

const drop = document.querySelector("#drop");
const input = drop.querySelector("input");
const answers = document.querySelector("#answers");
const about = document.querySelector("#about");

let classifier;
let queue = Promise.resolve(); // one photograph after the other, in order

function state(name) {
  document.body.dataset.state = name;
}

function classifyAll(files) {
  for (const file of files) {
    const card = newCard(file);
    queue = queue.then(() => fill(card, file));
  }
}

function newCard(file) {
  const card = document.querySelector("#card").content.cloneNode(true).firstElementChild;
  card.dataset.state = "waiting";
  card.querySelector("h2").textContent = "…";
  card.querySelector(".name").textContent = file.name;
  const image = card.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.onload = () => URL.revokeObjectURL(image.src);
  image.onerror = () => image.remove();
  answers.prepend(card);
  return card;
}

async function fill(card, file) {
  const title = card.querySelector("h2");
  const note = card.querySelector(".note");
  try {
    const { label, accepted, top, milliseconds } = await classifier.classify(file);
    const labels = classifier.activation === "sigmoid" ? top.filter((c) => c.probability >= SEVERAL).map((c) => c.label) : [label];
    title.textContent = accepted ? labels.join(", ") || "none of the classes" : "no answer";
    note.textContent = accepted
      ? `${Math.round(milliseconds)} ms`
      : `${label} is the most probable class, but below the threshold of ${classifier.threshold}`;
    const bars = top.slice(0, SHOWN).map((one) => bar(one, accepted && labels.includes(one.label)));
    card.querySelector(".bars").replaceChildren(...bars);
    card.dataset.state = accepted ? "done" : "rejected";
  } catch (error) {
    title.textContent = "This one did not work";
    note.textContent = `${file.name || "The file"}: ${error.message}`;
    card.querySelector(".name").remove();
    card.dataset.state = "error";
  }
}

function bar({ label, probability }, answer) {
  const row = document.querySelector("#bar").content.cloneNode(true).firstElementChild;
  row.classList.toggle("answer", answer);
  row.dataset.probability = probability;
  row.querySelector(".label").textContent = row.querySelector(".label").title = label;
  row.querySelector(".fill").style.width = `${100 * probability}%`;
  row.querySelector(".value").textContent = `${(100 * probability).toFixed(1)} %`;
  return row;
}

function listen() {
  input.disabled = false;
  input.addEventListener("change", () => {
    classifyAll(input.files);
    input.value = ""; // the same photograph can be chosen again
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault(); // or the browser opens the photograph in place of the page
    drop.classList.remove("over");
    classifyAll(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => classifyAll(event.clipboardData.files));
}

try {
  classifier = await open("model.onnx");
  const names = classifier.classNames;
  const some = names.length > 8 ? `${names.length} classes` : names.join(", ");
  about.textContent = `${some}. Backbone ${classifier.backbone.replace("torchvision/", "")}.`;
  listen();
  state("ready");
} catch (error) {
  about.textContent = `The model cannot be opened: ${error.message}`;
  state("broken");
}
