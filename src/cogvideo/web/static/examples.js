// Prompts that a model is known to understand, by its name.

export const EXAMPLES = {
  pocket: [
    "a red heart beats, on a white background",
    "a yellow face blinks, then opens its mouth into a happy smile, on a light blue background",
    "a yellow face in a party hat blows a party horn under falling confetti, on a pink background",
    "a green crocodile snaps its jaws, on a pink background",
    "a blue dolphin leaps, on a brown background",
    "slowly, a purple parcel jumps twice, then shoots up and away, on a beach",
    "on a green meadow, a huge orange pyramid rises high up and sinks again, moving right, in a hurry",
    "a large blue fish in a meadow slowly grows and bursts",
  ],
};
