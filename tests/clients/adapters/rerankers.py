"""The SDKs again, where they ask for scores."""

from __future__ import annotations

from tests.clients.adapters.ways import At, Ranks, in_order


def cohere_rerank(at: At) -> Ranks:
    import cohere

    client = cohere.ClientV2(api_key=at.key, base_url=at.url)

    def scores(query: str, texts: list[str]) -> list[float]:
        answer = client.rerank(model=at.model, query=query, documents=texts)
        return in_order(answer.results, "index", "relevance_score")

    return Ranks(scores)


def voyage_rerank(at: At) -> Ranks:
    import voyageai

    client = voyageai.Client(api_key=at.key, base_url=at.v1, max_retries=0)

    def scores(query: str, texts: list[str]) -> list[float]:
        answer = client.rerank(query, texts, model=at.model)
        return in_order(answer.results, "index", "relevance_score")

    return Ranks(scores)


def infinity_rerank(at: At) -> Ranks:
    from infinity_client import AuthenticatedClient
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    client = AuthenticatedClient(base_url=at.v1, token=at.key)

    def scores(query: str, texts: list[str]) -> list[float]:
        body = RerankInput(query=query, documents=texts, model=at.model)
        answer = rerank.sync_detailed(client=client, body=body)
        if answer.status_code != 200:
            raise RuntimeError(answer.content.decode())
        return in_order(answer.parsed.results, "index", "relevance_score")

    return Ranks(scores)


def tei_rerank(at: At) -> Ranks:
    from tei_client import HttpClient

    client = HttpClient(at.url, headers={"Authorization": f"Bearer {at.key}"})

    def scores(query: str, texts: list[str]) -> list[float]:
        return in_order(client.rerank(query, texts).scores, "index", "score")

    return Ranks(scores)


def baseten_rerank(at: At) -> Ranks:
    from baseten_performance_client import PerformanceClient

    client = PerformanceClient(at.url, at.key)

    def scores(query: str, texts: list[str]) -> list[float]:
        return in_order(client.rerank(query, texts, model=at.model).data, "index", "score")

    return Ranks(scores)
