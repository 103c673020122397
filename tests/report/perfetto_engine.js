// Perfetto's trace processor (WebAssembly) as a process: requests on standard input, replies on standard output, in the
// byte protocol of its RPC. Usage: node perfetto_engine.js FOLDER, where FOLDER holds engine_bundle.js and the .wasm files.
const fs = require("fs");
const path = require("path");

const folder = process.argv[2];
const worker = { location: { href: "file:///" } }; // the bundle is written for a web worker
class LocalRequest {
  open(_method, name) {
    this.file = path.join(folder, name);
  }
  send() {
    this.response = fs.readFileSync(this.file);
  }
}
const quiet = { log: () => {}, warn: (text) => process.stderr.write(`${text}\n`), error: (text) => process.stderr.write(`${text}\n`) };
const bundle = fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8");
new Function("self", "process", "WorkerGlobalScope", "XMLHttpRequest", "console", bundle)(worker, undefined, () => {}, LocalRequest, quiet);

const port = { onmessage: null, postMessage: (reply) => process.stdout.write(reply) };
worker.onmessage({ data: port });

async function send(bytes) {
  for (;;) {
    try {
      return port.onmessage({ data: bytes });
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // its memory is not there before the module is compiled
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
}

(async () => {
  for await (const chunk of process.stdin) await send(new Uint8Array(chunk));
})();
