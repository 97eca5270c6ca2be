// One line for each of the things that Node.js programs ask of the system.
const { execSync, fork } = require("child_process");
const { Worker } = require("worker_threads");
const fs = require("fs");

if (process.argv[2] === "child") {
  process.send("child");
} else {
  console.log("exec:", execSync("echo said").toString().trim());
  fork(__filename, ["child"]).on("message", (text) => console.log("fork:", text));
  const thread = 'require("worker_threads").parentPort.postMessage("thread")';
  new Worker(thread, { eval: true }).on("message", (text) => console.log("worker:", text));
  fs.writeFileSync("watched", "1");
  const watcher = fs.watch("watched", (event) => { console.log("watch:", event); watcher.close(); });
  fs.appendFileSync("watched", "2");
  const server = require("net").createServer().listen(0, "127.0.0.1", () => { console.log("listen:", server.listening); server.close(); });
  const udp = require("dgram").createSocket("udp4");
  udp.bind(0, "127.0.0.1", () => { console.log("udp:", udp.address().port > 0); udp.close(); });
  WebAssembly.compile(new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0])).then((it) => console.log("wasm:", it instanceof WebAssembly.Module));
}
