"""Writes the tables of docs/reliability.md: `make reliability`, or alone `python tests/reliability_page.py`.

With `--list` it prints the tests instead.

Each table lies between `<!-- promises: AREA -->` and `<!-- end -->`. A row is a promise, the tests that show it, and
from tests/reliability_counts.json how many trials they made in the last run, and how many held. Between
`<!-- covered -->` and `<!-- end -->` stands what the last run covered.
"""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
COUNTS = ROOT / "tests" / "reliability_counts.json"
BLOCK = re.compile(r"(<!-- promises: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
COVERED = re.compile(r"(<!-- covered -->\n).*?(<!-- end -->)", re.DOTALL)


class Promise(NamedTuple):
    """What is promised, and the tests that show it: `file::function`, both under tests/."""

    words: str
    tests: tuple[str, ...]


PROMISES = {
    "checkpoints": [
        Promise(
            "A file stands under its name whole or not at all, whenever its process is killed",
            (
                "test_files.py::test_a_kill_at_any_point_leaves_old_or_new_and_what_it_left_goes",
                "test_files.py::test_the_file_is_flushed_before_it_is_renamed_and_its_name_after",
            ),
        ),
        Promise(
            "kill -9 before any call of a save that changes the disk: the next start finds a whole checkpoint",
            (
                "engine/test_checkpoint.py::test_kill_at_every_point_of_a_save",
                "engine/test_checkpoint.py::test_kill_while_replacing_a_damaged_checkpoint_of_the_same_step",
                "engine/test_background_saver.py::test_kill_at_every_point_of_a_save_beside_steps",
                "reliability/test_reliability.py::test_kills_at_random_instants",
                "reliability/test_reliability.py::test_kills_at_named_points",
            ),
        ),
        Promise(
            "A checkpoint that is written beside the steps is that of its step, and its failure is not passed over",
            (
                "engine/test_background_saver.py::test_a_save_beside_the_steps_is_that_of_its_step",
                "engine/test_background_saver.py::test_an_error_of_the_writer_surfaces_at_the_next_step",
            ),
        ),
        Promise(
            "Weights or optimizer state with NaN, inf or exploded numbers never push out a sound checkpoint",
            ("engine/test_background_saver.py::test_unsound_state_does_not_push_out_a_sound_checkpoint",),
        ),
        Promise(
            "A damaged checkpoint is found by its hashes, and the one before is used; never a part of one",
            (
                "engine/test_checkpoint.py::test_any_damage_is_found_and_the_one_before_is_used",
                "engine/test_checkpoint.py::test_files_swapped_between_steps_are_found",
                "engine/test_checkpoint.py::test_an_edited_manifest_is_refused",
            ),
        ),
        Promise(
            "A run whose every checkpoint is damaged does not begin at step 0 in silence",
            (
                "engine/test_checkpoint.py::test_a_run_whose_every_checkpoint_is_damaged_does_not_start_again_from_nothing",
            ),
        ),
        Promise(
            "The old checkpoint goes only when the new one has been read back",
            ("engine/test_checkpoint.py::test_the_old_one_goes_only_after_the_new_one_reads_back",),
        ),
        Promise(
            "A full or failing disk: training goes on; at the end, exit code 2 says what is lost",
            (
                "engine/test_checkpoint.py::test_a_failing_disk_does_not_stop_training",
                "reliability/test_disk_errors.py::test_errors_at_the_nth_write",
                "train/test_loop.py::test_a_full_disk_at_the_end_is_an_error",
            ),
        ),
        Promise(
            "A resumed run is the uninterrupted one, bit for bit, in both stages",
            (
                "train/test_train_vae.py::test_resume_equals_the_uninterrupted_run",
                "train/test_train_sit.py::test_resume_equals_the_uninterrupted_run",
                "train/test_exact_resume.py::test_resume_after_every_step",
                "reliability/test_reliability.py::test_other_numbers_of_ranks",
                "reliability/test_reliability.py::test_chaos",
            ),
        ),
        Promise("Runs of older versions go on", ("train/test_old_runs.py::test_an_old_run_goes_on",)),
    ],
    "faults": [
        Promise(
            "A stopped, killed or hung rank ends the run in one line that names it",
            (
                "engine/test_watchdog.py::test_the_rank_that_does_not_answer_is_named",
                "engine/test_watchdog.py::test_one_rank_that_hangs_writes_its_stacks",
                "engine/test_watchdog.py::test_what_is_no_step_has_a_limit_of_its_own",
                "engine/test_watchdog.py::test_a_record_that_does_not_come_is_not_waited_for",
                "reliability/test_reliability.py::test_faults_of_a_rank",
            ),
        ),
        Promise(
            "A run that was stopped from outside and let go on (SIGSTOP, a job that Slurm suspended) goes on",
            (
                "engine/test_watchdog.py::test_a_process_that_was_stopped_goes_on",
                "engine/test_watchdog.py::test_ranks_that_were_stopped_together_go_on",
            ),
        ),
        Promise(
            "SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 are remembered until a step is done; a second SIGINT is obeyed",
            (
                "engine/test_signals.py::test_a_signal_is_remembered_until_asked",
                "engine/test_signals.py::test_second_interrupt_is_immediate",
            ),
        ),
        Promise(
            "Two jobs never write into one run, and no lock outlives its job",
            (
                "engine/test_run_lock.py::test_a_second_process_is_refused_until_the_first_is_gone_however_it_goes",
                "engine/test_run_lock.py::test_without_locks_of_the_file_system",
                "engine/test_run_lock.py::test_a_damaged_lock_file_locks_nobody_out",
            ),
        ),
        Promise(
            "Every process that a command starts ends with it, after kill -9 too",
            (
                "test_processes.py::test_workers_end_with_their_parent",
                "test_processes.py::test_processes_are_started_nowhere_else",
                "test_demo.py::test_workers_end_with_the_demo",
            ),
        ),
        Promise(
            "A thread of the data loader that dies or hangs ends the run, which goes on bit for bit; a dead pipeline "
            "of DALI changes nothing",
            (
                "train/test_data_under_fire.py::test_a_thread_of_the_loader_that_dies_ends_the_run_which_goes_on",
                "train/test_data_under_fire.py::test_a_thread_of_the_loader_that_hangs_is_named_and_the_run_goes_on",
                "train/test_data_under_fire.py::test_a_dead_pipeline_of_dali_changes_nothing",
                "train/test_data_under_fire.py::test_a_dead_thread_on_one_of_two_ranks_ends_both_and_the_run_goes_on",
                "train/test_data_under_fire.py::test_a_dead_pipeline_on_one_of_two_ranks_changes_nothing",
            ),
        ),
        Promise(
            "A long run holds no more memory, Python objects, descriptors and threads than a short one (steps)",
            ("train/test_soak.py::test_a_long_run_holds_no_more_than_a_short_one",),
        ),
        Promise(
            "A failing logger never stops training", ("engine/test_metrics.py::test_failures_warn_once_and_go_on",)
        ),
        Promise(
            "What the user can mend is one line and exit code 2",
            (
                "cli/test_main.py::test_a_mistake_is_one_clear_line_and_a_nonzero_exit",
                "cli/test_odd_paths.py::test_an_odd_path_is_one_line",
                "cli/test_odd_paths.py::test_pictures_may_lie_in_a_folder_whose_name_is_no_text",
            ),
        ),
    ],
    "data": [
        Promise(
            "A picture's cost is limited by counts; every reader refuses it alike, at once",
            (
                "data/test_limits.py::test_what_is_over_a_limit_is_refused_at_once",
                "data/test_limits.py::test_index_check_and_training_agree",
                "data/test_limits.py::test_dali_is_never_given_what_is_over_a_limit",
            ),
        ),
        Promise(
            "Odd and broken pictures have the same verdict in a folder, a tar and a parquet file",
            (
                "data/test_broken_files.py::test_verdict_and_pixels",
                "data/test_broken_files.py::test_the_verdict_is_the_same_in_a_folder_a_tar_and_a_parquet_file",
                "data/test_broken_files.py::test_names_and_files_that_are_none",
            ),
        ),
        Promise(
            "A picture that kills its decoder costs, in an index, itself alone",
            ("data/test_sandbox.py::test_a_picture_that_kills_its_process_costs_only_itself",),
        ),
        Promise(
            "A bad file shifts no other sample, on any number of ranks",
            ("data/test_loader.py::test_any_number_of_bad_files_shifts_nothing_on_any_number_of_ranks",),
        ),
        Promise(
            "Every sample comes exactly once in an epoch, also when the number of ranks changes",
            (
                "data/test_order.py::test_every_id_comes_exactly_once_per_epoch",
                "data/test_order.py::test_the_world_size_may_change_at_any_step",
            ),
        ),
        Promise(
            "A slow and failing file server changes nothing of a run, bit for bit",
            (
                "train/test_data_under_fire.py::test_a_slow_and_failing_file_server_changes_nothing",
                "data/test_tar.py::test_a_file_server_that_was_away_is_asked_again_with_a_new_descriptor",
            ),
        ),
        Promise(
            "A shard that changes under a run is named, and never read as the old one; the run goes on when it is back",
            (
                "train/test_data_under_fire.py::test_a_shard_that_is_replaced_is_named_and_the_run_goes_on",
                "data/test_tar.py::test_a_shard_that_changes_under_a_job_is_never_read_as_if_it_were_the_old_one",
            ),
        ),
        Promise("A killed index goes on where it was", ("data/test_index.py::test_a_killed_index_goes_on",)),
    ],
    "strangers": [
        Promise(
            "A damaged file of any kind that is read again is one line, or is read (copies)",
            tuple(
                f"{file}.py::test_damage_is_a_user_error_or_nothing"
                for file in (
                    "test_damaged_files",
                    "test_damaged_results",
                    "data/test_damaged_sources",
                    "evaluation/test_damaged_features",
                    "models/test_damaged_weights",
                )
            ),
        ),
        Promise("No weight file runs code", ("models/test_weights.py::test_never_runs_what_a_file_holds",)),
        Promise(
            "A hostile tar writes nothing, is not followed, and loses nothing that can be read",
            (
                "data/test_hostile_tar.py::test_members_that_are_passed_over",
                "data/test_hostile_tar.py::test_members_after_which_nothing_can_be_read",
                "data/test_hostile_tar.py::test_damaged_headers_raise_nothing_but_user_errors",
            ),
        ),
        Promise(
            "A report obeys no word of the run that it shows",
            (
                "report/test_hostile_run.py::test_no_word_of_a_run_is_obeyed",
                "report/test_hostile_run.py::test_a_page_shows_only_what_lies_in_its_folder",
            ),
        ),
        Promise(
            "A picture of a run is opened as a PNG and nothing else",
            ("test_png.py::test_another_format_is_not_opened",),
        ),
    ],
}


def named_tests() -> set[str]:
    """The tests of all promises, as pytest names them."""
    return {f"tests/{test}" for promises in PROMISES.values() for promise in promises for test in promise.tests}


def read_counts() -> list[dict]:
    """The lines of the committed counts."""
    return [json.loads(line) for line in COUNTS.read_text(encoding="utf-8").splitlines()] if COUNTS.exists() else []


def render(page: str, counts: list[dict]) -> str:
    """The page with its tables, and what they cover, as `PROMISES` and the counts have them."""
    page = COVERED.sub(lambda block: f"{block[1]}{_coverage(counts)}{block[2]}", page)
    return BLOCK.sub(lambda block: f"{block[1]}{_table(PROMISES[block[2]], counts)}{block[3]}", page)


def _coverage(counts: list[dict]) -> str:
    """How many of the tests have counts, how many trials those made, and when; a long run's steps are no trials."""
    num, counted = len(named_tests()), {count["test"].partition("[")[0] for count in counts}
    tried, held = (sum(count[key] for count in counts if count["promise"] != "soak") for key in ("tried", "survived"))
    dates = [count["date"][:10] for count in counts]
    others = f" The other {num - len(counted)} have dashes." if len(counted) < num else ""
    return (
        f"Counted so far: {len(counted)} of the {num} tests on this page, from {min(dates, default='-')} to "
        f"{max(dates, default='-')}, with {tried:,} trials, of which {held:,} held.{others}\n"
    )


def _table(promises: list[Promise], counts: list[dict]) -> str:
    lines = ["| promise | shown by | tried | held | last run |", "|---|---|---|---|---|"]
    for promise in promises:
        for number, test in enumerate(promise.tests):
            found = [count for count in counts if count["test"].partition("[")[0] == f"tests/{test}"]
            tried, held = (sum(count[key] for count in found) for key in ("tried", "survived"))
            when = max((f"{count['date'][:10]}, {count['commit']}" for count in found), default="-")
            numbers = f"{tried:,} | {held:,} | {when}" if found else "- | - | -"
            lines.append(f"| {'' if number else promise.words} | `{test}` | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        print(*sorted(named_tests()))
        sys.exit()
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read_counts()), encoding="utf-8")
