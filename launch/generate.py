"""Use a trained model: captions, retrieval, video summaries, transcripts.

    python launch/generate.py caption   --run runs/NAME --image FILE... --video FILE...
    python launch/generate.py retrieve  --run runs/NAME --media FOLDER --index FILE --text "a red square" --grid out.png
    python launch/generate.py summarize --run runs/NAME --video FILE... --output DIR
    python launch/generate.py transcribe --run runs/NAME --speech FILE...

Exit status: 0; 1 if some files could not be used (their names are printed); 2 if there is no answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsmoe_vl.command import leave, positive, run
from dsmoe_vl.inference.commands import Question, caption_media, print_error, retrieve, summarize_videos, transcribe
from dsmoe_vl.inference.generate import MAX_TOKENS
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.inference.media import media_files, open_media
from dsmoe_vl.inference.token_search import Search


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Use a trained model.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--run", type=Path, required=True, help="a run directory, or an exported model")
    common.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if available)")

    texts = argparse.ArgumentParser(add_help=False)
    texts.add_argument("--beam", type=int, default=1, metavar="N", help="beam search with N beams")
    texts.add_argument("--top-p", type=float, metavar="P", help="sample from the nucleus of probability P")
    texts.add_argument("--temperature", type=float, default=1.0, metavar="T", help="for sampling (%(default)s)")
    texts.add_argument("--seed", type=int, default=0, help="for sampling (%(default)s)")
    texts.add_argument("--max-tokens", type=positive, default=MAX_TOKENS, help="tokens at most (%(default)s)")
    texts.add_argument("--json", type=Path, metavar="FILE", help="also write the texts to this file")

    captions = commands.add_parser("caption", parents=[common, texts], help="describe images and videos")
    captions.add_argument("--image", type=Path, nargs="+", default=[], metavar="FILE")
    captions.add_argument("--video", type=Path, nargs="+", default=[], metavar="FILE")
    captions.add_argument("--media", nargs="+", default=[], metavar="FOLDER", help="with pictures, videos or shards")

    transcripts = commands.add_parser("transcribe", parents=[common, texts], help="write the words of recordings")
    transcripts.add_argument("--speech", type=Path, nargs="+", required=True, metavar="FILE")

    search = commands.add_parser("retrieve", parents=[common], help="search images and videos")
    search.add_argument("--media", required=True, metavar="FOLDER", help="with pictures and videos, or shards")
    search.add_argument("--index", type=Path, metavar="FILE", help="save the embeddings here and reuse them")
    question = search.add_mutually_exclusive_group(required=True)
    question.add_argument("--text", metavar="QUERY", help="search with this text")
    question.add_argument("--image", type=Path, metavar="FILE", help="search with this picture")
    question.add_argument("--video", type=Path, metavar="FILE", help="search with this video")
    question.add_argument("--speech", type=Path, metavar="FILE", help="search with this spoken query")
    search.add_argument("--top", type=positive, default=10, metavar="K", help="maximum results (%(default)s)")
    search.add_argument("--grid", type=Path, metavar="FILE.png", help="draw the results to this file")

    summaries = commands.add_parser("summarize", parents=[common], help="write texts and key frames of videos")
    summaries.add_argument("--video", type=Path, nargs="+", required=True, metavar="FILE")
    summaries.add_argument("--output", type=Path, required=True, metavar="DIR", help="results, one folder per video")
    summaries.add_argument("--key-frames", type=positive, metavar="N", help="per video (default: 15 %% of the frames)")
    summaries.add_argument("--max-tokens", type=positive, default=MAX_TOKENS, help="tokens at most (%(default)s)")
    args = parser.parse_args()
    if args.command == "caption" and not (args.image or args.video or args.media):
        captions.error("name at least one file with --image or --video, or a folder with --media")
    return args


def answer(args: argparse.Namespace) -> int:
    """Run the command: its exit status. Raises DsmoeVlError if there is no answer."""
    search = Search(args.beam, args.top_p, args.temperature, args.seed) if "beam" in args else Search()
    trained = load_run(args.run, args.device)
    if args.command == "transcribe":
        return transcribe(trained, media_files(args.speech, "speech"), args.max_tokens, search, args.json)
    if args.command == "caption":
        media = [*media_files(args.image, "image"), *media_files(args.video, "video")]
        media += [item for folder in args.media for item in open_media(folder, trained.recipe.data)]
        return caption_media(trained, media, args.max_tokens, search, args.json)
    if args.command == "retrieve":
        question = Question(args.text, args.image, args.video, args.speech)
        return retrieve(trained, open_media(args.media, trained.recipe.data), question, args.top, args.index, args.grid)
    return summarize_videos(trained, args.video, args.output, args.max_tokens, args.key_frames)


def main() -> int:
    """Exit status 2, with the reason in one line, if the run, the query or the folder cannot be used."""
    args = parse()
    return run(lambda: answer(args), print_error)


if __name__ == "__main__":
    leave(main())
