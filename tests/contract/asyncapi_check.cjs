// Prints what the official AsyncAPI parser makes of a document: its complaints, and channels, operations and messages.
const { Parser, fromFile } = require('@asyncapi/parser');

fromFile(new Parser(), process.argv[2]).parse().then(({ document, diagnostics }) => {
  const errors = diagnostics.filter((found) => found.severity === 0).map((found) => `${found.path.join('.')}: ${found.message}`);
  const channels = document === undefined ? [] : document.channels().all().map((channel) => ({
    address: channel.address(),
    parameters: channel.parameters().all().map((parameter) => parameter.id()),
    messages: channel.messages().all().map((message) => ({
      id: message.id(),
      contentType: message.contentType(),
      fields: Object.keys(message.payload().properties() || {}),
    })),
  }));
  const operations = document === undefined ? {} : Object.fromEntries(
    document.operations().all().map((operation) => [operation.id(), operation.action()]));
  console.log(JSON.stringify({ errors, channels, operations }));
});
