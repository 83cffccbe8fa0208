// What the page says, in English and Chinese.
export const words = {
  en: {
    start: "Start", end: "End", holdToTalk: "Hold to talk (or the space bar)", release: "Release to send",
    stopAnswer: "Stop the answer", handsFree: "hands-free", camera: "camera", voice: "voice", token: "Token",
    connect: "Connect", firstText: "first text", firstAudio: "first sound made", heardAfter: "first sound heard",
    queued: "sound waiting", send: "Send", file: "File", askHere: "Write a question",
    drop: "Drop pictures or sounds anywhere on the page.", spoken: "(spoken)", other: "中文", otherTag: "zh",
    notMeant: "(not meant for me)", noMicrophone: "The microphone cannot be used: ",
    noSecure: "Browsers give the microphone to pages of localhost and of https only; start the server with --tls.",
    lost: "The connection has ended.", refused: "The server refuses the connection; is the token right?",
    states: { off: "off", listening: "listening", hearing: "hearing you", thinking: "thinking", speaking: "speaking",
      ignored: "ignored: not meant for me" },
  },
  zh: {
    start: "开始", end: "结束", holdToTalk: "按住说话(或空格键)", release: "松开发送", stopAnswer: "停止回答",
    handsFree: "免提", camera: "摄像头", voice: "声音", token: "令牌", connect: "连接", firstText: "首个文字",
    firstAudio: "首个声音生成", heardAfter: "首个声音播放", queued: "待播放", send: "发送", file: "文件",
    askHere: "输入问题", drop: "可把图片或声音拖到页面上。", spoken: "(语音)", other: "English", otherTag: "en",
    notMeant: "(不是对我说的)", noMicrophone: "无法使用麦克风:",
    noSecure: "浏览器只允许 localhost 或 https 页面使用麦克风;请用 --tls 启动服务器。",
    lost: "连接已结束。", refused: "服务器拒绝连接;令牌是否正确?",
    states: { off: "未开始", listening: "在听", hearing: "听到您说话", thinking: "思考中", speaking: "回答中",
      ignored: "已忽略:不是对我说的" },
  },
};
