//! The command line, as a user runs it.

#[path = "support/two_nodes.rs"]
mod two_nodes;

use std::process::{Command, Output};

fn treeattn(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_treeattn")).args(args).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

#[test]
fn info_names_the_version_and_the_kernels() {
    let output = treeattn(&["info"]);
    assert!(output.status.success(), "{output:?}");
    let text = stdout(&output);
    assert!(text.starts_with(concat!("treeattn ", env!("CARGO_PKG_VERSION"))), "{text}");
    assert!(text.contains("\ncpu:0: ") && text.contains("\n  kernels: "), "{text}");
    let json: serde_json::Value = serde_json::from_str(stdout(&treeattn(&["info", "--json"]))).unwrap();
    assert!(json["machine"]["cores"].as_i64().unwrap() >= 1);
}

/// Constants, a table, and what pays: more GPUs for more keys, and one for few.
#[test]
fn simulate_recommends_gpus() {
    let file = std::env::temp_dir().join(format!("treeattn-cli-simulate-{}.json", std::process::id()));
    let path = file.to_str().unwrap();
    let output = treeattn(&["simulate", "--lengths", "1000,5120000", "--json", path]);
    assert!(output.status.success(), "{output:?}");
    let text = stdout(&output);
    assert!(text.contains("predicted, not measured") && text.contains("read bandwidth, GB/s: 4550"), "{text}");
    assert!(text.contains("1000 keys: one GPU") && text.contains("sharding loses"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(json["rows"].as_array().unwrap().len(), 2 * 10);
    let found = &json["recommended"][1];
    assert!(found["gpus"].as_i64().unwrap() >= 32 && found["algorithm"] == "TREE", "{found}");
    assert!(!treeattn(&["simulate", "--gpus", "0"]).status.success());
}

/// On a machine of two nodes, `info` names each and its device, and `bench` says where its ranks run.
#[test]
fn nodes_are_told() {
    let folder = std::env::temp_dir().join(format!("treeattn-cli-nodes-{}", std::process::id()));
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    // As sysfs writes a list, too.
    let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    two_nodes::write(&folder, [cpus, cpus]);
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_treeattn")).args(args).env("TREEATTN_SYSFS", &folder).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        stdout(&output).to_string()
    };
    let (text, json) = (run(&["info"]), run(&["info", "--json"]));
    let small = ["--pool-mib", "8", "--heads", "4/2x32", "--lengths", "100", "--ranks", "2", "--no-exchange"];
    let bench = run(&[&["bench", "--quick"], &small[..]].concat());
    std::fs::remove_dir_all(&folder).unwrap();

    for (node, device) in [(0, 1), (1, 2)] {
        let memory = node + 1;
        let line =
            format!("\ncpu:{device}: NUMA node {node}, cpus {cpus}, {memory} MiB; in C TREEATTN_CPU_NODE({node})\n");
        assert!(text.contains(&line), "{text}");
    }
    assert!(!text.contains("NUMA nodes: one"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let node = |number: u64, device: &str, name: &str| {
        serde_json::json!({
            "number": number, "device": device, "name": name, "cpus": cpus, "memory_bytes": (number + 1) << 20,
        })
    };
    let expected = [node(0, "cpu:1", "TREEATTN_CPU_NODE(0)"), node(1, "cpu:2", "TREEATTN_CPU_NODE(1)")];
    assert_eq!(json["machine"]["numa_nodes"], serde_json::json!(expected));
    let line = format!("\nranks run on cpu:0, which is NUMA nodes 0 (cpus {cpus}) and 1 (cpus {cpus}), ");
    assert!(bench.contains(&line), "{bench}");
}

#[test]
fn verify_passes_on_the_scalar_kernels() {
    let output = treeattn(&["verify", "--isa", "scalar", "--seed", "7"]);
    assert!(output.status.success(), "{}", stdout(&output));
    let text = stdout(&output);
    assert!(text.lines().filter(|line| line.starts_with("ok ")).count() > 50, "{text}");
    assert!(text.contains(" shapes passed, 0 failed"), "{text}");
}

/// Where there is no GPU, what is missing is said.
#[test]
fn verify_says_why_gpus_cannot_be_used() {
    let output = treeattn(&["info"]);
    if stdout(&output).contains("\ncuda:0: ") {
        return;
    }
    assert!(stdout(&output).contains("libcuda.so.1"), "{output:?}");
    for args in [["verify", "--device", "cuda:0"], ["verify", "--ranks", "cuda:0,cuda:1"]] {
        let output = treeattn(&args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(stdout(&output).contains("FAIL  cuda:0: "), "{output:?}");
        assert!(!stdout(&output).contains("\nok "), "{output:?}");
    }
}

#[test]
fn bench_writes_its_table_and_json() {
    let path = std::env::temp_dir().join(format!("treeattn-bench-{}.json", std::process::id()));
    let file = path.to_str().unwrap();
    let axes = ["--heads", "4/2x32,3/3x16", "--lengths", "100,333", "--ranks", "1,3", "--page-size", "0,16"];
    let more = ["--query-tokens", "1,5", "--dtype", "f16,f32", "--json", file];
    let args = [&["bench", "--quick", "--pool-mib", "8"], &more[..], &axes[..]].concat();
    let output = treeattn(&args);
    let text = std::fs::read_to_string(&path);
    let _ = std::fs::remove_file(&path);
    assert!(output.status.success(), "{output:?}");
    let json: serde_json::Value = serde_json::from_str(&text.unwrap()).unwrap();
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * 2 * 2 * 2 * 2 * 2);
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap();
        assert!(row["seconds"]["median"].as_f64().unwrap() > 0.0);
        assert!(number("over_ceiling") >= 1.0 && number("share_of_fma") <= 1.0, "{row}");
        assert!(number("bytes_per_second") <= number("ceiling"), "{row}");
    }
    assert_eq!(json["exchanges"][0]["ranks"], 3);
    assert!(json["ceiling"]["median"].as_f64().unwrap() > 0.0);
    assert!(stdout(&output).contains("4/2x32 1x333 pages of 16 5 query tokens"), "{}", stdout(&output));
}

#[test]
fn bench_tells_what_checking_adds() {
    let path = std::env::temp_dir().join(format!("treeattn-checked-{}.json", std::process::id()));
    let axes = ["--heads", "4/2x32", "--lengths", "100,333", "--ranks", "1,2", "--no-exchange"];
    let more = ["--json", path.to_str().unwrap(), "--checked"];
    let output = treeattn(&[&["bench", "--quick", "--pool-mib", "8"], &more[..], &axes[..]].concat());
    let text = std::fs::read_to_string(&path);
    let _ = std::fs::remove_file(&path);
    assert!(output.status.success(), "{output:?}");
    let json: serde_json::Value = serde_json::from_str(&text.unwrap()).unwrap();
    let rows = json["rows"].as_array().unwrap();
    // One rank has nothing to compare.
    assert_eq!(rows.len(), 2 * (1 + 2));
    for row in rows {
        let checked = row["checked"].as_bool().unwrap();
        let added = row["added_by_checks"]["median"].as_f64();
        assert_eq!((row["ranks"] == 2 || !checked, added.is_some_and(f64::is_finite)), (true, checked), "{row}");
    }
    assert!(stdout(&output).contains("checked steps"), "{}", stdout(&output));
}

#[test]
fn bench_compares_every_algorithm_and_draws_them() {
    let path = |end: &str| std::env::temp_dir().join(format!("treeattn-algorithms-{}.{end}", std::process::id()));
    let (json, svg) = (path("json"), path("svg"));
    let axes = ["--heads", "8/8x16", "--dtype", "f32", "--lengths", "96,960", "--ranks", "1,3,8"];
    let files = ["--json", json.to_str().unwrap(), "--plot", svg.to_str().unwrap()];
    let output =
        treeattn(&[&["bench", "--quick", "--pool-mib", "8", "--algorithms", "all"], &axes[..], &files[..]].concat());
    let (text, drawn) = (std::fs::read_to_string(&json), std::fs::read_to_string(&svg));
    let _ = (std::fs::remove_file(&json), std::fs::remove_file(&svg));
    assert!(output.status.success(), "{output:?}");
    let text: serde_json::Value = serde_json::from_str(&text.unwrap()).unwrap();
    let rows = text["algorithms"].as_array().unwrap();
    // One rank exchanges nothing.
    assert_eq!(rows.len(), 2 * 2 * 5);
    for row in rows {
        assert!(row["seconds"]["median"].as_f64().unwrap() > 0.0 && row["over_one_shot"].as_f64().unwrap() > 0.0);
        // A row's lse travels as two floats.
        let (ranks, d, lse) = (row["ranks"].as_u64().unwrap(), 8 * 16, 2 * 8);
        let cache = 2 * row["keys"].as_u64().unwrap() / ranks * d * 4;
        let (steps, sent) = match row["algorithm"].as_str().unwrap() {
            "ONE_SHOT" => (1, (ranks - 1) * (d + lse) * 4),
            "TREE" => (if ranks == 3 { 2 } else { 3 }, if ranks == 3 { 2 } else { 3 } * (d + lse) * 4),
            "RING" => (ranks, (ranks - 1) * cache),
            _ => continue,
        };
        assert_eq!((row["steps"].as_u64(), row["bytes_sent"].as_u64()), (Some(steps), Some(sent)), "{row}");
    }
    let drawn = drawn.unwrap();
    assert_eq!(drawn.matches("class=\"mark\"").count(), rows.len());
    for text in [">ALLREDUCE3<", ">8 ranks<", "8/8 heads x 16, 1 sequence, f32<", "bench --quick --pool-mib 8"] {
        assert!(drawn.contains(text), "{text}");
    }
    assert!(stdout(&output).contains("2btd p and 4btd + 2bd for the ring"), "{}", stdout(&output));
}

#[test]
fn bad_words_are_named() {
    for (args, word) in [
        (&["verify", "--isa", "sse9"][..], "sse9"),
        (&["verify", "--device", "cuda:0", "--isa", "avx2"], "--isa"),
        (&["verify", "--device", "cuda:0", "--ranks", "cuda:0"], "--ranks"),
        (&["verify", "--ranks", "cpu:0"], "wanted a GPU"),
        (&["bench", "--heads", "32x128"], "32x128"),
        (&["bench", "--device", "cuda"], "cpu:0 or cuda:N"),
        (&["bench", "--device", "cpu:1"], "cpu:0 or cuda:N"),
        (&["bench", "--device", "cuda:0", "--ranks", "2"], "--ranks"),
        (&["bench", "--device", "cuda:0", "--dtype", "f32"], "--dtype"),
        (&["bench", "--device", "cuda:1000"], "cuda:1000"),
        (&["bench", "--quick", "--query-tokens", "10", "--lengths", "9"], "--query-tokens"),
        (&["bench", "--algorithms", "two_shot,butterfly"], "butterfly"),
        (&["bench", "--quick", "--lengths", "9", "--plot", "x.svg"], "--algorithms"),
        (&["bench", "--device", "cuda:0", "--algorithms", "all"], "--algorithms"),
        (&["bench", "--quick", "--lengths", "0"], "--lengths"),
        (&["bench", "--quick", "--checked", "--ranks", "1"], "--checked"),
        (&["bench", "--device", "cuda:0", "--ranks", "2", "--checked"], "--ranks"),
        (&["bench", "--quick", "--lengths", "2147483647", "--batch", "2147483647"], "memory to read from"),
        (&["bench", "--quick", "--pool-mib", "8", "--heads", "5/2x8", "--no-exchange"], "kv_heads"),
    ] {
        let output = treeattn(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(word), "{args:?}: {output:?}");
    }
}
