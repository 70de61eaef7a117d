"""Our routes and error shape on an OpenAI-compatible FastAPI app. Knows no vLLM: any app and engine will do."""

from loramux.http.app import Services, attach

__all__ = ["Services", "attach"]
