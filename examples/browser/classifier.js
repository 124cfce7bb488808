// Everything that is about the model: its metadata, an image file's pixels, one answer.
// It shares no code with featx: what it does is the input contract in the exported file's metadata.
import * as ort from "./ort/ort.wasm.bundle.min.mjs";

ort.env.logLevel = "error";

/** Open a file that `featx export` wrote (with `--input pixels`, the default). */
export async function open(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be loaded (${response.status} ${response.statusText})`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  const metadata = readMetadata(bytes);
  if (metadata.featx_format !== "1") throw new Error(`${url} was not exported by featx, or by a newer one`);
  if (JSON.parse(metadata.input) !== "pixels") throw new Error(`${url} does not take images: export it with --input pixels`);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  if (!session.outputNames.includes("probabilities")) throw new Error(`${url} gives no probabilities: export it with them`);
  return new Classifier(session, metadata);
}

class Classifier {
  constructor(session, metadata) {
    this.session = session;
    this.classNames = JSON.parse(metadata.class_names);
    this.activation = JSON.parse(metadata.activation); // softmax: one class an image; sigmoid: any number
    this.threshold = JSON.parse(metadata.threshold); // below it, an answer is rejected; null accepts all
    this.backbone = JSON.parse(metadata.backbone);
  }

  /** A File or Blob -> { label, accepted, top: [{ label, probability }], milliseconds }, the most probable first. */
  async classify(file) {
    const images = await pixels(file);
    const begin = performance.now();
    let outputs;
    try {
      outputs = await this.session.run({ images }, ["probabilities"]);
    } catch (error) {
      throw new Error(
        String(error).includes("refuse_empty_or_beyond")
          ? "the image is longer than 64 times its width; cut it to the part that matters"
          : `onnxruntime cannot run the model on it (${error.message ?? error})`,
      );
    }
    const top = Array.from(outputs.probabilities.data, (probability, i) => ({ label: this.classNames[i], probability }));
    outputs.probabilities.dispose();
    images.dispose();
    top.sort((a, b) => b.probability - a.probability); // stable: the first of equals stays first
    const accepted = this.threshold === null || top[0].probability >= Math.fround(this.threshold);
    return { label: top[0].label, accepted, top, milliseconds: performance.now() - begin };
  }
}

/** An image file -> uint8 [1, H, W, 3], RGB, upright, at its own size: the model resizes. */
async function pixels(file) {
  let image;
  try {
    // The numbers in the file, as Pillow gives them: not converted from the camera's colour profile.
    image = await createImageBitmap(file, {
      imageOrientation: "from-image",
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw new Error("not an image that this browser can read");
  }
  const { width, height } = image;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { colorSpace: "srgb", willReadFrequently: true });
  if (!context) throw new Error(`${width} x ${height} pixels are too many for this browser; scale the image down`);
  context.drawImage(image, 0, 0);
  image.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    rgb[to++] = rgba[from];
    rgb[to++] = rgba[from + 1];
    rgb[to++] = rgba[from + 2];
  }
  return new ort.Tensor("uint8", rgb, [1, height, width, 3]);
}

/** The `metadata_props` of an ONNX file, which onnxruntime-web does not hand out: field 14 of a protobuf message. */
export function readMetadata(bytes) {
  const text = new TextDecoder();
  const found = {};
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const [key, value] = [1, 2].map((wanted) => {
      for (const [number, part] of fields(entry)) if (number === wanted) return text.decode(part);
      return "";
    });
    found[key] = value;
  }
  return found;
}

/** The fields of a protobuf message that hold bytes: [number, bytes]. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; at < bytes.length; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
    throw new Error("not an ONNX file");
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const size = varint();
      if (at + size > bytes.length) throw new Error("not an ONNX file, or cut short");
      yield [Math.floor(tag / 8), bytes.subarray(at, at + size)];
      at += size;
    } else throw new Error("not an ONNX file");
  }
}
