// A consumer written with MQTT.js: prints every verdict and heatmap that it gets, one JSON object per line, and
// acknowledges the verdicts. Arguments: port, root of the topics, name of the consumer, how many messages to take.
const { createHash } = require('crypto');
const mqtt = require('mqtt');

const [port, root, consumer, count] = process.argv.slice(2);
const client = mqtt.connect(`mqtt://127.0.0.1:${port}`, {
  protocolVersion: 5, clientId: consumer, clean: false, properties: { sessionExpiryInterval: 3600 },
});
let taken = 0;

client.on('connect', () => client.subscribe([`${root}/verdict`, `${root}/heatmap/+`], { qos: 1 }));
client.on('message', (topic, payload, packet) => {
  const isJson = packet.properties.contentType === 'application/json';
  const message = isJson ? JSON.parse(payload.toString()) : null;
  console.log(JSON.stringify({
    topic,
    contentType: packet.properties.contentType,
    expiry: packet.properties.messageExpiryInterval ?? null,
    sha256: createHash('sha256').update(payload).digest('hex'),
    message,
  }));
  taken += 1;
  const leave = () => { if (taken >= Number(count)) client.end(); };
  if (message === null) { leave(); return; }
  const ack = { schema: 'taktsight.ack/1', epoch: message.epoch, upto: message.seq, resend: false };
  client.publish(`${root}/ack/${consumer}`, JSON.stringify(ack), { qos: 1 }, leave);
});
