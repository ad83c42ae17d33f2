// The JavaScript clients. As in tests/clients/adapters/: a function of where, key and model gives how
// passages are embedded and, where the client has a method for it, how a question is.

const v1 = (at) => `${at.url}/v1`;
const both = (embeddings) => ({
  passages: (texts) => embeddings.embedDocuments(texts),
  query: (text) => embeddings.embedQuery(text),
});

export async function openai(at) {
  const { OpenAI } = await import("openai");
  const client = new OpenAI({ baseURL: v1(at), apiKey: at.key });
  return { passages: async (input) => rows(await client.embeddings.create({ model: at.model, input })) };
}

export async function azure(at) {
  const { AzureOpenAI } = await import("openai");
  const client = new AzureOpenAI({ endpoint: at.url, apiKey: at.key, apiVersion: "2024-10-21" });
  return { passages: async (input) => rows(await client.embeddings.create({ model: at.model, input })) };
}

const rows = (answer) => answer.data.map((row) => row.embedding);

export async function langchainOpenAI(at) {
  const { OpenAIEmbeddings } = await import("@langchain/openai");
  const configuration = { baseURL: v1(at) };
  return both(new OpenAIEmbeddings({ model: at.model, apiKey: at.key, configuration, maxRetries: 0 }));
}

export async function langchainCohere(at) {
  const { CohereEmbeddings } = await import("@langchain/cohere");
  const { CohereClient } = await import("cohere-ai");
  const client = new CohereClient({ token: at.key, environment: at.url });
  return both(new CohereEmbeddings({ model: at.model, client, maxRetries: 0 }));
}

export async function aiCompatible(at) {
  const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
  const provider = createOpenAICompatible({ name: "nv-embed", baseURL: v1(at), apiKey: at.key });
  return ofAi(provider.embeddingModel(at.model));
}

export async function aiOpenAI(at) {
  const { createOpenAI } = await import("@ai-sdk/openai");
  return ofAi(createOpenAI({ baseURL: v1(at), apiKey: at.key }).embedding(at.model));
}

async function ofAi(model) {
  const { embedMany } = await import("ai");
  return { passages: async (values) => (await embedMany({ model, values, maxRetries: 0 })).embeddings };
}

export async function llamaIndexOpenAI(at) {
  const { OpenAIEmbedding } = await import("@llamaindex/openai");
  const model = new OpenAIEmbedding({ model: at.model, apiKey: at.key, baseURL: v1(at), maxRetries: 0 });
  return {
    passages: (texts) => model.getTextEmbeddingsBatch(texts),
    query: (text) => model.getQueryEmbedding({ type: "text", text }),
  };
}

export async function voyage(at) {
  const { VoyageAIClient } = await import("voyageai");
  const client = new VoyageAIClient({ apiKey: at.key, environment: v1(at) });
  const ask = async (input, inputType) =>
    rows(await client.embed({ input, model: at.model, inputType, truncation: false }, { maxRetries: 0 }));
  return { passages: (texts) => ask(texts, "document"), query: async (text) => (await ask([text], "query"))[0] };
}

export async function cohere(at) {
  const { CohereClientV2 } = await import("cohere-ai");
  const client = new CohereClientV2({ token: at.key, environment: at.url });
  const ask = async (texts, inputType) =>
    (await client.embed({ texts, model: at.model, inputType, embeddingTypes: ["float"] }, { maxRetries: 0 }))
      .embeddings.float;
  return {
    passages: (texts) => ask(texts, "search_document"),
    query: async (text) => (await ask([text], "search_query"))[0],
  };
}

export async function huggingFace(at) {
  const { InferenceClient } = await import("@huggingface/inference");
  const client = new InferenceClient(at.key).endpoint(at.url);
  return { passages: (inputs) => client.featureExtraction({ inputs }) };
}

export async function ollama(at) {
  const { Ollama } = await import("ollama");
  const client = new Ollama({ host: at.url, headers: { Authorization: `Bearer ${at.key}` } });
  return { passages: async (input) => (await client.embed({ model: at.model, input })).embeddings };
}

export async function cohereRerank(at) {
  const { CohereClientV2 } = await import("cohere-ai");
  const client = new CohereClientV2({ token: at.key, environment: at.url });
  const scores = async (query, documents) => {
    const { results } = await client.rerank({ query, documents, model: at.model }, { maxRetries: 0 });
    return results.sort((a, b) => a.index - b.index).map((result) => result.relevanceScore);
  };
  return { scores };
}
