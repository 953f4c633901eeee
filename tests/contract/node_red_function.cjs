// Runs a function node of a Node-RED flow. Arguments: flow file, name of the node, file with a JSON list of payloads.
// Prints, for every payload, what left each output.
const { readFileSync } = require('fs');

const [flowFile, name, payloadFile] = process.argv.slice(2);
const node = JSON.parse(readFileSync(flowFile, 'utf8')).find((one) => one.type === 'function' && one.name === name);
const run = new Function('msg', 'flow', node.func);
const memory = new Map();
const flow = { get: (key) => memory.get(key), set: (key, value) => memory.set(key, value) };

const outputs = (result) => (Array.isArray(result) ? result : [result]).map(
  (output) => (output === null ? [] : [].concat(output)).map((msg) => msg.payload));
const payloads = JSON.parse(readFileSync(payloadFile, 'utf8'));
console.log(JSON.stringify(payloads.map((payload) => outputs(run({ payload }, flow)))));
