// Lists interfaces as Node does (libuv: getifaddrs) and prints {"interfaces": [names] or an errno}.
const os = require("node:os");
let answer;
try {
  answer = Object.keys(os.networkInterfaces());
} catch (error) {
  // Node names this error by its number only: "Unknown system error 1".
  answer = Math.abs(error.errno ?? error.info?.errno ?? NaN) || String(error.message);
}
console.log(JSON.stringify({ interfaces: answer }));
