// Puts all that the page needs into site/: the page, onnxruntime-web's two files, and the model.
//     npm run build -- ../../export/<run>/model.onnx
import { copyFileSync, existsSync, mkdirSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const [model, site = join(here, "site")] = process.argv.slice(2);
if (!model || !existsSync(model)) {
  console.error(`${model ? `There is no file ${model}. ` : ""}Usage: npm run build -- MODEL.onnx [SITE]`);
  process.exit(2);
}
const ort = join(here, "node_modules", "onnxruntime-web", "dist");
if (!existsSync(ort)) {
  console.error("onnxruntime-web is not installed: run `npm ci` first.");
  process.exit(1);
}
rmSync(join(site, "ort"), { recursive: true, force: true });
mkdirSync(join(site, "ort"), { recursive: true });
for (const name of ["index.html", "style.css", "page.js", "classifier.js"]) {
  copyFileSync(join(here, name), join(site, name));
}
// The build for the CPU alone, of about 14 MB; those with WebGPU or WebGL are not needed.
for (const name of ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"]) {
  copyFileSync(join(ort, name), join(site, "ort", name));
}
copyFileSync(model, join(site, "model.onnx"));
console.log(`${site} is complete: any static web server can serve it.`);
